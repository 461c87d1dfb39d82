// exp and tanh on the registers of `Lanes`. For the bodies of kernels (foreach_isa.h), hence no include guard.

// e**x for x <= 0, within 2 units in the last place; 0 below -87 and NaN of NaN. Of x = n ln 2 + r with a whole n,
// e**r is its Taylor polynomial of degree 7: the next term is below 6e-9 where |r| <= (ln 2) / 2.
inline Lanes::Float exp_of_negative(Lanes::Float x) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes::Float))));
  const Lanes::Float shift = Lanes::all(0x1.8p23f);  // 0x4B400000; floats of this size are whole numbers
  const Lanes::Float shifted = Lanes::madd(x, Lanes::all(0x1.715476p0f), shift);  // 1 / ln 2
  const Lanes::Float n = shifted - shift;
  Lanes::Float r = Lanes::madd(n, Lanes::all(-0x1.63p-1f), x);  // ln 2 in two parts: n times the first is exact
  r = Lanes::madd(n, Lanes::all(0x1.bd0106p-13f), r);

  Lanes::Float y = Lanes::all(1.0f / 5040);
  y = Lanes::madd(y, r, Lanes::all(1.0f / 720));
  y = Lanes::madd(y, r, Lanes::all(1.0f / 120));
  y = Lanes::madd(y, r, Lanes::all(1.0f / 24));
  y = Lanes::madd(y, r, Lanes::all(1.0f / 6));
  y = Lanes::madd(y, r, Lanes::all(0.5f));
  y = Lanes::madd(y, r, Lanes::all(1.0f));
  y = Lanes::madd(y, r, Lanes::all(1.0f));

  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4B400000u - 127u)) << 23;  // the exponent of 2**n
  Lanes::Float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < Lanes::all(-87.0f) ? Lanes::zero() : y * power;
}

// Within 4 units in the last place. Below 1/4, where 1 - e**-2|x| cancels, its Taylor polynomial of degree 9.
inline Lanes::Float tanh_of(Lanes::Float x) {
  const Lanes::Float size = x < Lanes::zero() ? -x : x;
  const Lanes::Float e = exp_of_negative(size * Lanes::all(-2.0f));
  const Lanes::Float far = (Lanes::all(1.0f) - e) / (Lanes::all(1.0f) + e);

  const Lanes::Float square = x * x;
  Lanes::Float y = Lanes::all(62.0f / 2835);
  y = Lanes::madd(y, square, Lanes::all(-17.0f / 315));
  y = Lanes::madd(y, square, Lanes::all(2.0f / 15));
  y = Lanes::madd(y, square, Lanes::all(-1.0f / 3));
  const Lanes::Float near = Lanes::madd(y * square, x, x);
  return size < Lanes::all(0.25f) ? near : x < Lanes::zero() ? -far : far;
}
