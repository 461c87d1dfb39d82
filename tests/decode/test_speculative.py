"""Text does not change with speculation; only how many steps of the target it takes does."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import xlathe as xl
from tests.passes.decoding import stepped
from tests.variants import DECODERS
from xlathe.aot import Buckets, find_speculation, served_arrays, served_state, to_step, units
from xlathe.decode.drafters import PREFIX, Drafter, NGram, Propose, Read
from xlathe.decode.logits import leave_only
from xlathe.decode.speculative import Speculation
from xlathe.decode.units import NO_TOKEN
from xlathe.errors import OptionError
from xlathe.memory import plan_from_graph
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes import CacheLayout
from xlathe.program import Program
from xlathe.run import Run
from xlathe.target import find_target

VOCAB, SLOTS, ROWS = 61, 48, 3
CONFIG = LlamaConfig(VOCAB, width=32, layers=1, query_heads=4, key_value_heads=2, head_dim=8, hidden=64)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5], [7, 8, 9]]
LONGEST = SLOTS - len(PROMPTS[0])  # tokens that fill row 0 to its end
GREEDY: dict[str, Any] = {"seed": 4}
SAMPLED = {"temperature": [0.7, 1.5, 1.0], "top_k": [20, 0, 0], "top_p": [1.0, 1.0, 0.9], "seed": [1, 2, 3]}
GAMMAS = (1, 2, 4, 8)


def traced(seed: int, scale: float = 1.0, vocab: int = VOCAB, max_len: int = 64) -> xl.Graph:
    """A model whose logits are multiplied by a weight: the draft of the same seed is right, or with -1000 wrong."""
    model = Llama(dataclasses.replace(CONFIG, vocab=vocab), rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)

    def scaled(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        # The logits of a model that was never trained are flat: sharper ones prefer a few tokens, as a trained model's.
        return 4 * params["scale"] * nnx.merge(graphdef, params["model"])(tokens)

    return xl.trace(scaled, {"model": state, "scale": jnp.float32(scale)}, max_len=max_len)


def built(target: xl.Graph, draft: Any = None, gamma: int = 4, rule: str = "match") -> Program:
    """Compiles for three rows alone, half of what `xl.compile` does."""
    buckets = Buckets((ROWS,), (8,), 10, SLOTS, gamma if draft is not None else 0)
    told = isinstance(draft, Told)
    speculation = Speculation(draft, rule) if told else find_speculation(target, draft, rule, buckets)
    step = to_step(target)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    compiled = units(step, buckets, "cpu", speculation=speculation)
    return Program(
        calls={u.signature.name: quickly(u.function, u.signature.avals) for u in compiled},
        arrays=served_arrays(step, speculation),
        state_avals={ROWS: served_state(step, buckets, ROWS, speculation)},
        buckets=buckets,
        vocab=step.vocab,
        memory=plan_from_graph(step, buckets, find_target("cpu"), speculation),
        tokenizer=words,
        step=step,
        speculation=speculation,
    )


@final
@dataclasses.dataclass(frozen=True)
class Told(Drafter):
    """Proposes what its arrays say: `text` int32 [r, s], drafts by position, and `offered`, how many a round at most.

    What is drafted is data, so that one program serves drafts of every kind and number.
    """

    @property
    def arrays(self) -> dict[str, jax.Array]:
        return self.told(np.zeros((ROWS, SLOTS), np.int32), 0)

    @staticmethod
    def told(text: np.ndarray, offered: int) -> dict[str, jax.Array]:
        return {f"{PREFIX}text": jnp.asarray(text, jnp.int32), f"{PREFIX}offered": jnp.int32(offered)}

    def state_types(self, rows: int, slots: int) -> dict[str, Any]:
        return {}

    def reader(self, fix: Any, rows: int, tokens: int) -> Read:
        return lambda arrays, args, state: state

    def proposer(self, fix: Any, rows: int, vocab: int, gamma: int) -> Propose:
        def propose(
            arrays: Any, text: jax.Array, lengths: jax.Array, going: jax.Array, sampling: Any, state: Any
        ) -> tuple[jax.Array, jax.Array, Any]:
            each = jnp.arange(gamma)
            known, places = arrays[f"{PREFIX}text"], lengths[:, None] + 1 + each
            drafts = known.at[jnp.arange(rows)[:, None], places].get(mode="fill", fill_value=NO_TOKEN)
            drafts = jnp.where(each < arrays[f"{PREFIX}offered"], drafts, NO_TOKEN)
            return drafts, leave_only(drafts, vocab), state

        return propose


def quickly(function: Callable[..., Any], avals: tuple[Any, ...]) -> Callable[..., Any]:
    """`compile_unit` without optimization of the machine code, in half its time."""
    lowered = jax.jit(function, donate_argnums=(len(avals) - 1,)).lower(*avals)
    return lowered.compile({"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def target() -> xl.Graph:
    return traced(0)


@pytest.fixture(scope="module")
def plain(target: xl.Graph) -> Program:
    return built(target)


@pytest.fixture(scope="module")
def drafting(target: xl.Graph) -> Callable[..., Program]:
    """Programs by gamma and kind of draft; those of one gamma are compiled once, and differ in weights."""
    programs: dict[Any, Program] = {}
    random = {PREFIX + name: array for name, array in traced(1).arrays.items()}
    scale = f"{PREFIX}scale"

    def get(gamma: int, kind: str = "random", rule: str = "match") -> Program:
        if (gamma, rule) not in programs:
            programs[gamma, rule] = built(target, target, gamma, rule)
        program = programs[gamma, rule]
        changes = {"right": {}, "wrong": {scale: jnp.float32(-1000)}, "random": random}[kind]
        assert changes.keys() <= program.arrays.keys()
        return dataclasses.replace(program, arrays={**program.arrays, **changes})

    return get


@pytest.fixture(scope="module")
def looking_up(target: xl.Graph) -> Program:
    return built(target, "ngram", 4)


def told(program: Program, **options: Any) -> list[tuple[Any, ...]]:
    return [(c.tokens, c.text, c.finish_reason) for c in program.generate(**options)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["right", "wrong", "random"])
@pytest.mark.parametrize(
    "gamma", [pytest.param(g, marks=[pytest.mark.breadth] if g in GAMMAS[1:-1] else []) for g in GAMMAS]
)
def test_tokens_are_those_of_plain_decoding(
    plain: Program, drafting: Callable[..., Program], gamma: int, kind: str, options: dict[str, Any]
) -> None:
    for prompts, count in ((PROMPTS, LONGEST), ([PROMPTS[2]], 7), ([PROMPTS[1]], 1)):
        request = {key: v[: len(prompts)] if isinstance(v, list) else v for key, v in options.items()}
        request |= {"prompt": prompts, "max_tokens": count}
        found = drafting(gamma, kind).generate(**request)
        assert [c.tokens for c in found] == [c.tokens for c in plain.generate(**request)]
        assert {c.finish_reason for c in found} == {"length"}
    stats = drafting(gamma, kind).generate(PROMPTS, LONGEST, **options)[0].stats
    assert len(stats.acceptance) == gamma
    if kind == "right":
        assert stats.acceptance == (1.0,) * gamma
        assert stats.tokens_per_step > 0.75 * (gamma + 1)  # the last round of a unit or a text may be shorter
    if kind == "wrong":
        assert stats.acceptance == (0.0,) * gamma
        assert stats.tokens_per_step == 1


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_plain_decoding_by_look_up(
    plain: Program, looking_up: Program, options: dict[str, Any]
) -> None:
    repeated = [[9, 4, 9, 4, 9, 4], [5], [7, 8, 7, 8]]
    for prompts in (PROMPTS, repeated):
        request = {"prompt": prompts, "max_tokens": LONGEST, **options}
        assert told(looking_up, **request) == told(plain, **request)


GAMMA = max(GAMMAS)
PAGED, RING = CacheLayout("paged", page=8), CacheLayout("ring", slack=GAMMA + 1)
LAYOUTS = [CacheLayout(dtype="int8"), *(dataclasses.replace(x, dtype=d) for x in (PAGED, RING) for d in (None, "int8"))]


@pytest.fixture(scope="module")
def windowed() -> xl.Graph:
    """A step that sees a window, as a ring needs; its logits prefer a few tokens."""
    (variant,) = (v for v in DECODERS if v.name == "window_7")
    return stepped(variant)


@pytest.fixture(scope="module")
def windowed_plain(windowed: xl.Graph) -> dict[str | None, Program]:
    """Plain decoding over the cache as derived, by its dtype: layouts change how it is kept, not what is read."""
    return {None: built(windowed), "int8": built(CacheLayout(dtype="int8")(windowed))}


@pytest.mark.xdist_group("layouts")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_are_those_of_plain_decoding_over_every_layout(
    windowed: xl.Graph, windowed_plain: dict[str | None, Program], layout: CacheLayout
) -> None:
    program, rng = built(layout(windowed), Told(), GAMMA), np.random.default_rng(0)
    for options in (GREEDY, SAMPLED):
        request = {"prompt": PROMPTS, "max_tokens": LONGEST, **options}
        expected = [c.tokens for c in windowed_plain[layout.dtype].generate(**request)]
        assert min(len(set(tokens)) for tokens in expected) > 2
        right = np.zeros((ROWS, SLOTS), np.int32)
        for row, prompt, tokens in zip(right, PROMPTS, expected, strict=True):
            row[len(prompt) : len(prompt) + len(tokens)] = tokens
        coins = rng.random(right.shape) < 0.7
        drafts = {"right": right, "wrong": (right + 1) % program.vocab, "random": np.where(coins, right, 0)}
        for offered, (kind, text) in itertools.product(GAMMAS, drafts.items()):
            arrays = program.arrays | Told.told(text, offered)
            found = dataclasses.replace(program, arrays=arrays).generate(**request)
            assert [c.tokens for c in found] == expected, (options, offered, kind)
            stood = {"right": 1.0, "wrong": 0.0}.get(kind, found[0].stats.acceptance[0])
            assert found[0].stats.acceptance[0] == stood
            assert kind != "random" or 0 < stood < 1
            assert kind == "random" or found[0].stats.acceptance == (stood,) * offered + (0.0,) * (GAMMA - offered)


def test_look_up_drafts_what_is_repeated(plain: Program, looking_up: Program) -> None:
    (whole,) = plain.generate([PROMPTS[1]], 40)
    prompt = [*PROMPTS[1], *whole.tokens[:20], *PROMPTS[1]]  # the answer's beginning was seen, after the same token
    stats = looking_up.generate([prompt], 12)[0].stats
    assert stats.tokens_per_step > 1.5


@pytest.mark.parametrize("kind", ["right", "random"])
def test_rows_end_at_stop_tokens(plain: Program, drafting: Callable[..., Program], kind: str) -> None:
    program = drafting(4, kind)
    texts = [c.tokens for c in plain.generate(PROMPTS, 20, **SAMPLED)]
    for place in range(7):  # a round's first token, and each of its drafts
        request = {"prompt": PROMPTS, "max_tokens": 20, "stop": [texts[0][place], texts[1][place + 3]], **SAMPLED}
        assert told(program, **request) == told(plain, **request)


def test_what_follows_a_stop_token_is_not_counted(plain: Program, drafting: Callable[..., Program]) -> None:
    (whole,) = plain.generate([PROMPTS[0]], 20)
    stop = whole.tokens[2]
    place = whole.tokens.index(stop)
    (found,) = drafting(8, "right").generate([PROMPTS[0]], 20, stop=stop)
    assert found.finish_reason == "stop"
    assert found.stats.new_tokens == place
    assert found.stats.tokens_per_step == place + 1


def test_stop_strings_and_streams(plain: Program, drafting: Callable[..., Program]) -> None:
    program = drafting(4, "right")
    for place in range(9, 14):  # across rounds and units
        words = [f"w{i}" for i in plain.generate([PROMPTS[0]], 25)[0].tokens]
        request = {"prompt": PROMPTS, "max_tokens": 25, "stop": f"{words[place]} {words[place + 1]}"}
        expected = told(plain, **request)
        assert expected[0][2] == "stop"
        assert told(program, **request) == expected
        pieces = list(program.stream(**request))
        for row, (tokens, text, _) in enumerate(expected):
            assert "".join(p.text for p in pieces if p.row == row) == text
            assert tuple(t for p in pieces if p.row == row for t in p.tokens) == tokens


@pytest.mark.parametrize("kind", ["wrong", "random"])
def test_slots_past_the_end_of_a_row_are_never_read(
    plain: Program, drafting: Callable[..., Program], kind: str
) -> None:
    program = drafting(8, kind)
    run = Run(program, program.limits.request(PROMPTS, LONGEST, None, **SAMPLED))
    run.state = tuple(jnp.full_like(x, jnp.nan if x.dtype == jnp.float32 else 0) for x in run.state)
    for _ in run.pieces():
        pass
    expected = plain.generate(PROMPTS, LONGEST, **SAMPLED)
    assert [c.tokens for c in run.completions()] == [c.tokens for c in expected]
    lengths = [len(p) + LONGEST for p in PROMPTS]
    for cache in run.state[2:4]:  # of the target
        for row, length in enumerate(lengths):
            assert np.isnan(np.asarray(cache[row, length:])).all()


def test_the_ratio_rule(plain: Program, drafting: Callable[..., Program]) -> None:
    request = {"prompt": PROMPTS, "max_tokens": LONGEST}
    assert told(drafting(2, "random", "ratio"), **request) == told(plain, **request)  # greedy laws are points
    for options in (GREEDY, SAMPLED):
        stats = drafting(2, "right", "ratio").generate(**request, **options)[0].stats
        assert stats.acceptance == (1.0, 1.0)
    found = [drafting(2, "random", "ratio").generate(**request, **{**SAMPLED, "seed": s}) for s in (1, 1, 2)]
    one, again, other = ([c.tokens for c in completions] for completions in found)
    assert one == again != other


def test_a_saved_program_drafts_when_loaded(
    drafting: Callable[..., Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = drafting(2, "right")
    program.save(tmp_path / "bundle")
    loaded = xl.load(tmp_path / "bundle", verify="all")
    request = {"prompt": PROMPTS, "max_tokens": 12, **SAMPLED}
    assert told(loaded, **request) == told(program, **request)
    assert loaded.generate(**request)[0].stats.acceptance == (1.0, 1.0)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Everything that XLA compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("which", ["plain", "draft", "loaded"])
def test_nothing_is_compiled_again(
    plain: Program,
    drafting: Callable[..., Program],
    compilations: list[str],
    which: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the prompts, options and stops are: requests run the programs of their bucket, and nothing else."""
    program = drafting(4, "random") if which == "draft" else plain
    if which == "loaded":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        plain.save(tmp_path / "bundle")
        program = xl.load(tmp_path / "bundle")
    jax.jit(lambda x: x + 1)(jnp.ones(7))
    assert compilations  # the listener hears
    program.generate(PROMPTS, 20)
    compilations.clear()
    program.generate([[9, 8], [3] * 20, [4]], 15, stop=[3], **SAMPLED)
    assert not compilations


@pytest.mark.parametrize("which", ["plain", "draft", "ngram"])
def test_loops_call_no_host_and_copy_no_cache(
    plain: Program, drafting: Callable[..., Program], looking_up: Program, which: str
) -> None:
    program = {"plain": plain, "draft": drafting(4), "ngram": looking_up}[which]
    text = program.calls[f"decode_r{ROWS}"].as_text()
    assert "while(" in text
    assert "callback" not in text
    cache = f"f32[{ROWS},{SLOTS},{CONFIG.key_value_heads},{CONFIG.head_dim}]"
    assert cache in text
    entry = re.split(r"^ENTRY", text, flags=re.MULTILINE)
    assert len(entry) == 2
    assert not re.findall(rf"= {re.escape(cache)}\S* copy\(.*", entry[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": traced(0, vocab=60)}, "the draft has a vocabulary of 60 tokens, the target of 61"),
        ({"draft": traced(0, max_len=40)}, "max_len=48, but the draft was traced with max_len=40"),
        ({"draft": "ngram", "gamma": 48}, "gamma=48 drafts and the token before them do not fit max_len=48"),
        ({"draft": "ngram", "gamma": 0}, "gamma must be an integer of at least 1, got 0"),
        ({"draft": "ngram", "gamma": 2.0}, "gamma must be an integer of at least 1, got 2.0"),
        ({"draft": "ngram", "rule": "ration"}, "no rule 'ration'; did you mean 'ratio'"),
        ({"draft": "bigram"}, "draft must be a graph, 'ngram' or a Drafter, got 'bigram'"),
        ({"draft": NGram}, "draft must be a graph, 'ngram' or a Drafter, got <class"),
    ],
)
def test_drafts_that_do_not_fit(target: xl.Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xl.compile(target, max_len=SLOTS, **options)


def test_a_draft_with_another_tokenizer(target: xl.Graph, plain: Program) -> None:
    other = Tokenizer(models.WordLevel({f"v{i}": i for i in range(VOCAB)}, unk_token="v0"))
    with pytest.raises(OptionError, match="the tokenizers of draft and target give tokens other ids"):
        xl.compile(target.replace(tokenizer=plain.tokenizer), draft=target.replace(tokenizer=other))


def test_a_unit_may_be_shorter_than_a_round(target: xl.Graph, plain: Program) -> None:
    program = xl.compile(target, max_len=SLOTS, chunks=(8,), unit=3, draft=NGram(2), gamma=4)
    (found,) = program.generate([[5, 5, 5]], 20)
    assert found.tokens == plain.generate([[5, 5, 5]], 20)[0].tokens
    assert NO_TOKEN not in found.tokens
