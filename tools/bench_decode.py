"""How fast a 1B-parameter Llama decodes and reads prompts, beside what memory allows, and what drafts add.

Its weights are random, made in the form that each scheme stores them in: no scheme needs more memory than its own.
The drafter is right as often as it is told to be, so that the gain is a function of the acceptance alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from xlathe.aot import to_step
from xlathe.decode.drafters import PREFIX, Drafter, Fix, Propose, Read
from xlathe.decode.logits import Sampling, leave_only
from xlathe.graph import Graph, Weights
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.program import Completion, Program, compile
from xlathe.report import weight_bytes
from xlathe.step import State
from xlathe.tools.bench_kernels import memory_read
from xlathe.tools.source import preset
from xlathe.tools.stages import machine
from xlathe.trace import trace

LLAMA_1B = LlamaConfig(vocab=32_000, width=2048, layers=16, query_heads=32, key_value_heads=8, head_dim=64, hidden=8192)
SCHEMES = ("float32", "int8", "int4", "int4_a8")
READ_BYTES = 1 << 29
STD = 0.02  # of weights
STD_OF_CODES = {"int8": 73.9, "uint8": 4.61}  # uniform ones, of 8 and of 4 bits


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: completions of `prompt` tokens by `new` ones, the median of `rounds`."""

    prompt: int = 128
    new: int = 32
    rounds: int = 2
    acceptances: tuple[float, ...] = (0.6, 0.8, 0.9)
    gamma: int = 4


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Oracle(Drafter):
    """Proposes the tokens of a text that is known, each of them wrong with probability 1 - acceptance.

    text: int32 [slots]; coins: float32 [slots], uniform in [0, 1). The token at p is right where coins[p] < acceptance.
    """

    text: np.ndarray
    coins: np.ndarray
    acceptance: float

    @property
    def arrays(self) -> Mapping[str, Array]:
        known = {"text": self.text, "coins": self.coins, "acceptance": np.float32(self.acceptance)}
        return {PREFIX + name: jnp.asarray(value) for name, value in known.items()}

    def state_types(self, rows: int, slots: int) -> dict[str, Any]:
        return {}

    def reader(self, fix: Fix, rows: int, tokens: int) -> Read:
        return lambda arrays, args, state: state

    def proposer(self, fix: Fix, rows: int, vocab: int, gamma: int) -> Propose:
        def propose(
            arrays: Mapping[str, Array], text: Array, lengths: Array, going: Array, sampling: Sampling, state: State
        ) -> tuple[Array, Array, State]:
            places = jnp.minimum(lengths[:, None] + 1 + jnp.arange(gamma), text.shape[1] - 1)
            right = arrays[PREFIX + "coins"][places] < arrays[PREFIX + "acceptance"]
            known = arrays[PREFIX + "text"][places]
            drafts = jnp.where(right, known, (known + 1) % vocab)
            return drafts, leave_only(drafts, vocab), state

        return propose


@dataclasses.dataclass(frozen=True)
class Measured:
    """Medians of one program: tokens a second, and what `Stats` says of its steps."""

    name: str
    prefill: float
    decode: float
    tokens_per_step: float
    different: int  # tokens that plain decoding would not have given


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One scheme: bytes of its weights, bytes a second that memory delivered beside it, and its programs."""

    scheme: str
    weights: int
    read: float
    plain: Measured
    drafted: tuple[Measured, ...]

    @property
    def limit(self) -> float:
        """Tokens a second, if a step took as long as reading the weights once."""
        return self.read / self.weights


def shape_of(config: LlamaConfig, max_len: int) -> Graph:
    """Returns the graph of a model whose weights take no memory: all are zero."""
    definition, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    zeros = jax.tree.map(lambda aval: np.broadcast_to(np.zeros((), aval.dtype), aval.shape), state)
    return trace(nnx.merge(definition, zeros), max_len=max_len)


def with_random_weights(step: Graph) -> Graph:
    """Returns the graph with random weights in place of its own, which are never made."""
    rng = np.random.default_rng(0)
    arrays = {name: random_weight(name, step.aval(name), rng) for name in step.names("weight")}
    consts = {name: step.weights[name] for name in step.names("const")}
    return step.replace(weights=Weights({**arrays, **consts}))


def random_weight(name: str, aval: Any, rng: np.random.Generator) -> Array:
    """Returns a weight or a part of one; their products keep the size of activations."""
    dtype = jnp.dtype(aval.dtype)
    if dtype.name in STD_OF_CODES:
        return jnp.asarray(np.frombuffer(rng.bytes(aval.size), dtype).reshape(aval.shape))
    if name.endswith(".scale"):
        codes = "uint8" if dtype == jnp.bfloat16 else "int8"
        return jnp.full(aval.shape, STD / STD_OF_CODES[codes], dtype)
    if aval.ndim == 1:
        return jnp.ones(aval.shape, dtype)  # of a norm
    uniform = rng.random(aval.shape, np.float32)
    uniform -= 0.5
    uniform *= STD * np.sqrt(12)
    return jnp.asarray(uniform)


def run(program: Program, prompt: Sequence[int], sizes: Sizes) -> list[Completion]:
    """Completes the prompt again and again; the first completion does not count."""
    each = (program.generate([list(prompt)], max_tokens=sizes.new)[0] for _ in range(sizes.rounds + 1))
    return list(each)[1:]


def measured(name: str, completions: Sequence[Completion], expected: Sequence[int]) -> Measured:
    stats = [c.stats for c in completions]
    return Measured(
        name,
        float(np.median([s.prompt_tokens / s.prefill_seconds for s in stats])),
        float(np.median([s.new_tokens / s.decode_seconds for s in stats])),
        stats[0].tokens_per_step,
        sum(a != b for a, b in zip(completions[0].tokens, expected, strict=True)),
    )


def read_rate(rounds: int) -> float:
    """Returns the best bytes a second at which XLA adds up a large array."""
    case = memory_read(READ_BYTES)
    for _ in range(rounds + 1):
        case.measure()
    return READ_BYTES / min(case.seconds)


def measure(scheme: str, shape: Graph, sizes: Sizes) -> Outcome:
    """Compiles and times one scheme without drafts, and with drafts of every acceptance."""
    step = with_random_weights(to_step(preset(scheme)(shape)))
    prompt = np.random.default_rng(1).integers(0, step.vocab, sizes.prompt).tolist()
    options: dict[str, Any] = {"max_len": shape.max_len, "unit": sizes.new, "chunks": (sizes.prompt,)}
    completions = run(compile(step, **options), prompt, sizes)
    text = completions[0].tokens
    plain, read = measured("plain", completions, text), read_rate(sizes.rounds)
    known = np.zeros(shape.max_len, np.int32)
    known[: sizes.prompt + len(text)] = [*prompt, *text]
    coins = np.random.default_rng(2).random(shape.max_len, np.float32)
    oracles = [Oracle(known, coins, acceptance) for acceptance in sizes.acceptances]
    drafting = compile(step, draft=oracles[0], gamma=sizes.gamma, **options)
    drafted = tuple(
        measured(f"{oracle.acceptance:.1f}", run(told(drafting, oracle), prompt, sizes), text) for oracle in oracles
    )
    return Outcome(scheme, weight_bytes(step), read, plain, drafted)


def told(program: Program, oracle: Oracle) -> Program:
    """Returns the program with what another oracle of the same sizes knows."""
    return dataclasses.replace(program, arrays={**program.arrays, **oracle.arrays})


def outcomes(config: LlamaConfig, schemes: Sequence[str], sizes: Sizes) -> Iterator[Outcome]:
    """Measures one scheme after the other, so that the weights of one are in memory at a time."""
    shape = shape_of(config, max_len=sizes.prompt + sizes.new + sizes.gamma)
    for scheme in schemes:
        yield measure(scheme, shape, sizes)


def speed_table(found: Sequence[Outcome]) -> Table:
    table = Table(title="plain decoding, and what memory allows: as if a step took as long as reading the weights")
    rates = ("prefill\ntokens/s", "decode\ntokens/s", "memory\nGB/s", "allows\ntokens/s")
    for column in ("", "weights\nGB", *rates, "share"):
        table.add_column(column, justify="right" if column else "left")
    for each in found:
        speed = each.plain.decode
        numbers = (each.weights / 1e9, each.plain.prefill, speed, each.read / 1e9, each.limit)
        table.add_row(each.scheme, *(f"{number:.2f}" for number in numbers), f"{speed / each.limit:.0%}")
    return table


def speculation_table(found: Sequence[Outcome], sizes: Sizes) -> Table:
    table = Table(title=f"speculation, gamma = {sizes.gamma}, drafts that cost nothing")
    for column in ("", "acceptance", "tokens\na step", "decode\ntokens/s", "/ plain", "other\ntokens"):
        table.add_column(column, justify="right" if column else "left")
    for each in found:
        for way in each.drafted:
            speeds = (way.tokens_per_step, way.decode, way.decode / each.plain.decode)
            table.add_row(each.scheme, way.name, *(f"{speed:.2f}" for speed in speeds), str(way.different))
    return table


def main() -> None:
    console, sizes = Console(), Sizes()
    found = []
    for each in outcomes(LLAMA_1B, SCHEMES, sizes):
        console.print(f"{each.scheme}: {each.plain.decode:.2f} tokens/s")
        found.append(each)
    console.print(f"{machine()}; prompt of {sizes.prompt} tokens, {sizes.new} new ones, median of {sizes.rounds}")
    console.print(speed_table(found))
    console.print(speculation_table(found, sizes))


if __name__ == "__main__":
    main()
