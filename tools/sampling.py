"""The flags that say how text is sampled; their names are those of `Program.generate`'s options."""

from absl import flags


def define_sampling(values: flags.FlagValues) -> None:
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "sample among so many likeliest tokens; 0 is all", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "sample among the likeliest with this share together", flag_values=values
    )
    flags.DEFINE_float(
        "min_p", 0.0, "drop what is less likely than this share of the likeliest", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "equal seeds give equal text", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "a string that ends the text; may be given again", flag_values=values
    )
