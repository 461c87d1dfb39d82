// Searches for the scale (and the minimum) at which the weighted squared error of rounded numbers is least.
//
// Included by body.h only. Each tries a fixed list of scales and solves for the best one given the codes of each.
// Operands are read left to right: a * b * c is rounded after a * b.

constexpr float kNothing = 1e-15f;  // blocks of smaller numbers are all zero

// The products that a scale is made of: sums of weight * x * code and of weight * code * code.
struct Products {
  Numbers xl{}, l2{};
};

template <int n>
inline Products signed_products(const Numbers* x, const Numbers* weight, Numbers inverse, int most) {
  Products sums;
  for (int j = 0; j < n; ++j) {
    const Numbers l = to_float(clip(nearest(inverse * x[j]), -most, most - 1));
    sums.xl += weight[j] * x[j] * l;
    sums.l2 += weight[j] * l * l;
  }
  return sums;
}

// x ~ scale * (code - most), 0 <= code < 2 * most; where all x are nothing the scale and the codes are 0.
template <int n>
inline Numbers search_symmetric(const Numbers* x, const Numbers* weight, int most, Ints* codes) {
  const Extremes range = extremes<n>(x);
  const Ints nothing = range.size < kNothing;
  const float whole = static_cast<float>(most);
  Numbers inverse = -whole / range.peak;
  const Products first = signed_products<n>(x, weight, inverse, most);
  Numbers scale = first.l2 != 0.0f ? first.xl / first.l2 : Numbers{};
  Numbers best = scale * first.xl;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const Numbers tried = -(whole + 0.1f * static_cast<float>(step)) / range.peak;
    const Products sums = signed_products<n>(x, weight, tried, most);
    const Ints better = (sums.l2 > 0.0f) & (sums.xl * sums.xl > best * sums.l2);
    scale = better ? sums.xl / sums.l2 : scale;
    best = better ? scale * sums.xl : best;
    inverse = better ? tried : inverse;
  }
  for (int j = 0; j < n; ++j) codes[j] = ~nothing & (most + clip(nearest(inverse * x[j]), -most, most - 1));
  return nothing ? Numbers{} : scale;
}

// The same by coordinate descent: one code after the other takes its best value given the rest. Weights are x * x.
template <int n>
inline Numbers descend_symmetric(const Numbers* x, int most, Ints* codes) {
  const Extremes range = extremes<n>(x);
  const Ints nothing = range.size < kNothing;
  const Numbers inverse = -static_cast<float>(most) / range.peak;
  Numbers weight[n];
  Ints code[n];
  Products sums;
  for (int j = 0; j < n; ++j) {
    weight[j] = x[j] * x[j];
    code[j] = clip(nearest(inverse * x[j]), -most, most - 1);
    sums.xl += weight[j] * x[j] * to_float(code[j]);
    sums.l2 += weight[j] * to_float(code[j]) * to_float(code[j]);
  }
  for (int sweep = 0; sweep < 5; ++sweep) {
    Ints changed{};
    for (int j = 0; j < n; ++j) {
      const Numbers old = to_float(code[j]);
      Numbers xl = sums.xl - weight[j] * x[j] * old;
      Numbers l2 = sums.l2 - weight[j] * old * old;
      const Ints next = clip(nearest(x[j] * l2 / xl), -most, most - 1);
      const Ints open = (xl > 0.0f) & (next != code[j]);
      xl += weight[j] * x[j] * to_float(next);
      l2 += weight[j] * to_float(next) * to_float(next);
      const Ints better = open & (l2 > 0.0f) & (xl * xl * sums.l2 > sums.xl * sums.xl * l2);
      code[j] = better ? next : code[j];
      sums.xl = better ? xl : sums.xl;
      sums.l2 = better ? l2 : sums.l2;
      changed |= better;
    }
    if (!any(changed)) break;
  }
  for (int j = 0; j < n; ++j) codes[j] = ~nothing & (code[j] + most);
  return (~nothing & (sums.l2 > 0.0f)) ? sums.xl / sums.l2 : Numbers{};
}

struct Affine {
  Numbers scale, least;  // x ~ scale * code - least; least >= 0
};

// A list of tried inverse scales: (first + step * i + most) / range for 0 <= i <= steps.
struct Tries {
  float first, step;
  int steps;
};

// x ~ scale * code - least, 0 <= code <= most. The error is squared, or its size alone where `sizes` is true.
// What was found so far is where the next try begins.
template <int n, bool sizes>
inline Affine search_affine(const Numbers* x, const Numbers* weight, int most, Tries tries, Ints* codes) {
  Numbers low = x[0], high = x[0], sum_w = weight[0], sum_x = weight[0] * x[0];
  for (int j = 1; j < n; ++j) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
    sum_w += weight[j];
    sum_x += weight[j] * x[j];
  }
  low = low > 0.0f ? Numbers{} : low;
  const Ints flat = high == low;
  const float whole = static_cast<float>(most);
  const Numbers lowest = low;
  Numbers level[n];
  const auto round = [&](Numbers inverse, Numbers from) {
    for (int j = 0; j < n; ++j) level[j] = to_float(clip(nearest(inverse * (x[j] - from)), 0, most));
  };
  const auto error = [&](Numbers scale, Numbers from) {
    Numbers sum{};
    for (int j = 0; j < n; ++j) {
      const Numbers off = scale * level[j] + from - x[j];
      sum += weight[j] * (sizes ? absolute(off) : off * off);
    }
    return sum;
  };
  Numbers inverse = whole / (high - low), begin = low;  // of the codes that are the best so far
  Numbers scale = 1.0f / inverse;
  round(inverse, low);
  Numbers least_error = error(scale, low);
  for (int i = 0; i <= tries.steps; ++i) {
    const Numbers tried = (tries.first + tries.step * static_cast<float>(i) + whole) / (high - low);
    round(tried, low);
    Numbers sum_l{}, sum_l2{}, sum_xl{};
    for (int j = 0; j < n; ++j) {
      const Numbers weighted = weight[j] * level[j];
      sum_l += weighted;
      sum_l2 += weighted * level[j];
      sum_xl += weighted * x[j];
    }
    const Numbers determinant = sum_w * sum_l2 - sum_l * sum_l;
    Numbers next = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    Numbers from = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    const Ints above = from > 0.0f;
    next = above ? sum_xl / sum_l2 : next;
    from = above ? Numbers{} : from;
    const Numbers found = error(next, from);
    const Ints better = (determinant > 0.0f) & (found < least_error);
    least_error = better ? found : least_error;
    inverse = better ? tried : inverse;
    begin = better ? low : begin;
    scale = better ? next : scale;
    low = better ? from : low;
  }
  for (int j = 0; j < n; ++j) codes[j] = ~flat & clip(nearest(inverse * (x[j] - begin)), 0, most);
  return {flat ? Numbers{} : scale, -(flat ? lowest : low)};
}

// x ~ scale * code for x >= 0, 0 <= code <= most: a scan of scales, then coordinate descent.
template <int n>
inline Numbers search_positive(const Numbers* x, const Numbers* weight, int most, Ints* codes) {
  Numbers high{};
  for (int j = 0; j < n; ++j) high = high > x[j] ? high : x[j];
  const Ints nothing = high < kNothing;
  const float whole = static_cast<float>(most);
  Numbers inverse = whole / high, least_error{};
  for (int j = 0; j < n; ++j) {
    const Numbers off = x[j] - 1.0f / inverse * to_float(nearest(inverse * x[j]) & 255);
    least_error += weight[j] * off * off;
  }
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const Numbers tried = (0.1f * static_cast<float>(step) + whole) / high, scale = 1.0f / tried;
    Numbers error{};
    for (int j = 0; j < n; ++j) {
      const Numbers off = x[j] - scale * to_float(least(nearest(tried * x[j]), Ints{} + most));
      error += weight[j] * off * off;
    }
    const Ints better = error < least_error;
    least_error = better ? error : least_error;
    inverse = better ? tried : inverse;
  }
  Products sums;
  for (int j = 0; j < n; ++j) {
    const Ints code = least(nearest(inverse * x[j]), Ints{} + most);
    sums.xl += weight[j] * x[j] * to_float(code);
    sums.l2 += weight[j] * to_float(code) * to_float(code);
    codes[j] = code & 255;
  }
  for (int sweep = 0; sweep < 5; ++sweep) {
    Ints changed{};
    for (int j = 0; j < n; ++j) {
      const Numbers old = to_float(codes[j]);
      Numbers xl = sums.xl - weight[j] * x[j] * old;
      Numbers l2 = sums.l2 - weight[j] * old * old;
      const Ints next = least(nearest(x[j] * l2 / xl), Ints{} + most);
      const Ints open = (xl > 0.0f) & (l2 > 0.0f) & (next != codes[j]);
      xl += weight[j] * x[j] * to_float(next);
      l2 += weight[j] * to_float(next) * to_float(next);
      const Ints better = open & (xl * xl * sums.l2 > sums.xl * sums.xl * l2);
      codes[j] = better ? next & 255 : codes[j];
      sums.xl = better ? xl : sums.xl;
      sums.l2 = better ? l2 : sums.l2;
      changed |= better;
    }
    if (!any(changed)) break;
  }
  for (int j = 0; j < n; ++j) codes[j] &= ~nothing;
  return (~nothing & (sums.l2 > 0.0f)) ? sums.xl / sums.l2 : Numbers{};
}
