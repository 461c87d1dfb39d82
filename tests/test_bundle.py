"""A saved program, loaded, is the same program; a bundle that is not whole says what is wrong with it."""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import xlathe as xl
from xlathe import bundle, bundle_check, manifest
from xlathe.aot import Buckets, served_state, to_step, units
from xlathe.card import Card
from xlathe.executable_cache import cache_folder
from xlathe.kernels import native
from xlathe.memory import plan_from_graph
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes import Canonicalize, Quantize
from xlathe.program import Program, compile_unit
from xlathe.target import find_target

VOCAB = 61
CARD = Card({"model_type": "llama"}, chat_template="{{ messages }}")
REQUEST: dict[str, Any] = {
    "prompt": [[1, 2, 3, 4, 5, 6, 7], [9]],
    "max_tokens": 6,
    "temperature": [0.0, 1.0],
    "top_k": [0, 20],
    "seed": [1, 2],
}
FILES = [
    "manifest.json",
    "weights.safetensors",
    "tokenizer.json",
    "programs/decode_r2.stablehlo",
    "programs/decode_r2.reference.stablehlo",
    "programs/prefill_r2_n4.stablehlo",
    "programs/prefill_r2_n4.reference.stablehlo",
]
needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels were not built")


def compiled(graph: xl.Graph) -> Program:
    """Compiles for two rows alone, half of what `xl.compile` does."""
    step, buckets = to_step(graph), Buckets(batches=(2,), chunks=(4,), unit=4, slots=32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Program(
        calls={u.signature.name: compile_unit(u.function, u.signature.avals) for u in units(step, buckets, "cpu")},
        arrays=step.arrays,
        state_avals={2: served_state(step, buckets, 2, None)},
        buckets=buckets,
        vocab=VOCAB,
        memory=plan_from_graph(step, buckets, find_target("cpu"), None),
        tokenizer=words,
        stop_tokens=(3,),
        step=step,
        card=CARD,
    )


def tokens(program: Program) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in program.generate(**REQUEST)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    config = LlamaConfig(VOCAB, width=32, layers=1, query_heads=4, key_value_heads=2, head_dim=8, hidden=64)
    graph = Canonicalize()(xl.trace(Llama(config, rngs=nnx.Rngs(0)), max_len=32))
    quantizers = {"int8": Quantize("int8"), "int4": Quantize("int4", symmetric=False, activations="int8")}
    return {"float32": compiled(graph), **{name: compiled(pass_(graph)) for name, pass_ in quantizers.items()}}


@pytest.fixture(scope="module")
def saved(programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for name, program in programs.items():
        program.save(folder / name)
    return {name: folder / name for name in programs}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the int8 bundle, to be damaged."""
    return Path(shutil.copytree(saved["int8"], tmp_path / "bundle"))


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("compiled again")


def change(folder: Path, **fields: Any) -> None:
    """Replaces fields of the manifest as somebody would who can compute its checksum."""
    changed = dataclasses.replace(bundle_check.read_manifest(folder), **fields)
    (folder / "manifest.json").write_text(manifest.to_text(changed))


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_loaded_program_generates_the_same(
    programs: dict[str, Program], saved: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = programs[kind].generate(**REQUEST)
    for _ in range(2):  # compiled the first time, from the cache the second
        loaded = xl.load(saved[kind], verify="all")
        assert loaded.card == CARD
        found = loaded.generate(**REQUEST)
        assert [(c.tokens, c.text, c.finish_reason) for c in found] == [
            (c.tokens, c.text, c.finish_reason) for c in expected
        ]
        monkeypatch.setattr(jax.stages.Lowered, "compile", fail)


def test_a_loaded_program_needs_no_flax(programs: dict[str, Program], saved: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['flax'] = None; sys.modules['xlathe.models'] = None; import xlathe as xl; "
        f"print([c.tokens for c in xl.load({str(saved['int8'])!r}).generate(**{REQUEST!r})])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == (repr(tokens(programs["int8"])), 0), result.stderr


@needs_kernels
def test_reference_programs_run_without_kernels(
    programs: dict[str, Program],
    saved: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def missing() -> None:
        raise xl.XlatheError("the CPU kernels were not built")

    monkeypatch.setattr(native, "register", missing)
    for _ in range(2):
        assert tokens(xl.load(saved["int8"])) == tokens(programs["int8"])
    monkeypatch.setattr(native, "TARGETS", ())
    assert tokens(xl.load(saved["int8"])) == tokens(programs["int8"])
    warnings = [record.message for record in caplog.records if "reference programs" in record.message]
    assert warnings == ["reference programs run, which are slower: the CPU kernels were not built"]


def test_what_a_bundle_holds(saved: dict[str, Path]) -> None:
    described = {kind: json.loads((saved[kind] / "manifest.json").read_text()) for kind in saved}
    for kind, folder in saved.items():
        wanted = {name for name in FILES if "reference" not in name or described[kind]["custom_calls"]}
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == wanted
        assert set(described[kind]["files"]) == wanted - {"manifest.json"}
    for kind, target in {"int8": "xlathe.quantized_dot.int8", "int4": "xlathe.quantized_dot.int4_a8"}.items():
        assert (target in described[kind]["custom_calls"]) == (native.library() is not None)
    described = described["int8"]
    weights = described["files"]["weights.safetensors"]["size"]
    assert weights == (saved["int8"] / "weights.safetensors").stat().st_size
    assert weights < (saved["float32"] / "weights.safetensors").stat().st_size / 2
    assert [i["dtype"] for i in described["inputs"]].count("int8") == 8
    built, expires = (datetime.date.fromisoformat(described[name]) for name in ("built", "expires"))
    assert (expires - built).days == 180
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~_umask() for path in saved["int8"].rglob("*.*"))


def test_programs_do_not_depend_on_where_they_were_saved(
    programs: dict[str, Program], saved: dict[str, Path], tmp_path: Path
) -> None:
    (lambda: programs["int8"].save(tmp_path / "again"))()  # from another line, through another caller
    first, second = (
        {path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in (saved["int8"], tmp_path / "again")
    )
    assert first == second
    assert not any(b".py" in content for content in first.values())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_an_error(copy: Path, name: str) -> None:
    path = copy / name
    if not path.exists():
        pytest.skip("without kernels there are no reference programs")
    content = path.read_bytes()
    for size in range(0, len(content), 1024):
        path.write_bytes(content[:size])
        with pytest.raises(xl.BundleError, match=path.name):
            xl.load(copy)
    path.unlink()
    with pytest.raises(xl.BundleError, match=path.name):
        xl.load(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_an_error(copy: Path, name: str) -> None:
    path = copy / name
    if not path.exists():
        pytest.skip("without kernels there are no reference programs")
    content = path.read_bytes()
    for i in range(0, len(content), max(1, len(content) // 97)):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        with pytest.raises(xl.BundleError, match=path.name):
            xl.load(copy, verify="all")


def test_a_changed_weight_header_is_an_error_without_hashes(copy: Path) -> None:
    path, described = copy / "weights.safetensors", bundle_check.read_manifest(copy)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for i in range(header):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 5)]) + content[i + 1 :])
        with pytest.raises(xl.BundleError, match=path.name):
            bundle_check.weights(copy, described)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format", "xlathe-graph", "expected format 'xlathe-bundle'"),
        ("version", 1, "version is 1, expected 2"),
        ("built", "yesterday", "built is 'yesterday', expected a date"),
        ("versions/jax", None, "jax is None, expected a version"),
        ("platform", "", "platform is '', expected a name"),
        ("vocab", "61", "vocab is '61', expected a positive number"),
        ("vocab", True, "vocab is True, expected a positive number"),
        ("vocab", 10**30, "vocab is 10+, expected a positive number"),
        ("buckets", [], r"buckets is \[\], expected an object"),
        ("buckets/chunks", [], r"chunks is \[\], expected increasing numbers"),
        ("buckets/batches", [2, 1], r"batches is \[2, 1\], expected increasing numbers"),
        ("buckets/batches", [2, 3], r"states are of \[2\] rows, the programs of \(2, 3\)"),
        ("buckets/chunks", list(range(1, 9000)), "too few for 9000 programs"),
        ("buckets/unit", 0, "unit is 0, expected a positive number"),
        ("stop_tokens", [-1], r"stop_tokens is \[-1\], expected a list of token ids"),
        ("inputs/0/dtype", "float33", "dtype is 'float33', expected a dtype"),
        ("inputs/0/shape", [1.5], r"shape is \[1.5\], expected a list of sizes"),
        ("states", {"-2": []}, "expected numbers of rows"),
        ("memory", None, "memory is None, expected an object"),
        ("memory/weights", -1, "weights is -1, expected a number of bytes"),
        ("memory/cache/page", 0, "page is 0, expected a positive number"),
        ("memory/temporaries", "few", "temporaries is 'few', expected a number of bytes or null"),
        ("memory/batch", 3, "checksum is wrong"),
        ("custom_calls", "abs", "custom_calls is 'abs', expected a list of names"),
        ("files/weights.safetensors/size", -1, "size is -1, expected a number of bytes"),
        ("files/weights.safetensors/sha256", "A" * 64, "expected 64 hexadecimal digits"),
        ("files/..~weights", {"size": 0, "sha256": "0" * 64}, "files lists '..~weights', which is no part"),
        ("card", [], r"the model's card: expected an object of config, generation, chat_template, special_tokens"),
        ("card/config", 3, "the model's card: config is 3, expected an object"),
        ("card/generation", {"eos_token_id": "x"}, "the model's card: eos_token_id is 'x', expected a token id"),
        ("card", None, "checksum is wrong"),
        ("vocab", 62, "checksum is wrong"),
        ("expires", "2999-01-01", "checksum is wrong"),
        ("remark", "hello", "checksum is wrong"),
    ],
)
def test_a_changed_manifest_is_an_error(copy: Path, path: str, value: Any, expected: str) -> None:
    file = copy / "manifest.json"
    described = json.loads(file.read_text())
    *parents, last = path.split("/")
    place = described
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    file.write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    with pytest.raises(xl.BundleError, match=expected) as error:
        xl.load(copy)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"format": NaN}'])
def test_a_manifest_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(xl.BundleError, match=r"manifest\.json"):
        xl.load(copy)


def test_an_expired_bundle_says_when_and_what_to_do(copy: Path) -> None:
    change(copy, expires=datetime.date(2026, 5, 4))
    with pytest.raises(xl.BundleError, match=r"expired on 2026-05-04: build it again from the model"):
        xl.load(copy)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"platform": "tpu"}, "was compiled for tpu, but this process runs on cpu"),
        ({"vocab": 62}, "the arguments of the program differ from what the manifest says"),
        ({"states": {2: ()}}, "the arguments of the program differ"),
        ({"inputs": ()}, r"has [0-9]+ arrays, expected 0"),
    ],
)
def test_a_manifest_of_another_bundle(copy: Path, fields: dict[str, Any], expected: str) -> None:
    change(copy, **fields)
    with pytest.raises(xl.BundleError, match=expected):
        xl.load(copy)


def test_weights_of_another_type(copy: Path) -> None:
    first, *others = bundle_check.read_manifest(copy).inputs
    change(copy, inputs=(dataclasses.replace(first, dtype="bfloat16"), *others))
    with pytest.raises(xl.BundleError, match=r"weights.safetensors has '.+' .+ where '.+' bfloat16\[.*\] is expected"):
        xl.load(copy)


def test_what_is_no_program(copy: Path) -> None:
    path = copy / "programs/decode_r2.stablehlo"
    path.write_bytes(b"something else")
    files = bundle_check.read_manifest(copy).files
    change(copy, files={**files, "programs/decode_r2.stablehlo": bundle_check.file_entry(path)})
    with pytest.raises(xl.BundleError, match=r"decode_r2.stablehlo: JAX .+ cannot read it.+it was written on 20"):
        xl.load(copy)


def test_what_is_no_bundle(copy: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", copy / "manifest.json"):
        with pytest.raises(xl.BundleError, match="is no directory, expected a bundle"):
            xl.load(path)
    with pytest.raises(xl.BundleError, match=r"manifest.json cannot be read: .*No such file"):
        xl.load(tmp_path)
    (copy / "weights.safetensors").unlink()
    os.mkfifo(copy / "weights.safetensors")  # would block whoever opens it
    with pytest.raises(xl.BundleError, match=r"weights.safetensors is no file"):
        xl.load(copy)
    with pytest.raises(xl.OptionError, match="did you mean 'all'"):
        xl.load(copy, verify="al")


def test_only_bundles_are_replaced(programs: dict[str, Program], copy: Path, tmp_path: Path) -> None:
    program = dataclasses.replace(programs["float32"], tokenizer=None)
    program.save(copy)
    assert xl.load(copy).tokenizer is None
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(xl.BundleError, match=r"is not replaced by a bundle: it holds notes\.txt"):
        program.save(copy)
    with pytest.raises(xl.BundleError, match="is a file"):
        program.save(copy / "notes.txt")
    assert (copy / "notes.txt").read_text() == "mine"
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text("{}")
    with pytest.raises(xl.BundleError, match=r"it holds manifest\.json, which is of no older bundle"):
        program.save(tmp_path / "web")


@pytest.mark.parametrize("step", ["_write_programs", "_replace"])
def test_a_failed_save_leaves_what_was_there(
    programs: dict[str, Program], copy: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    before = {path: path.read_bytes() for path in copy.rglob("*.*")}
    monkeypatch.setattr(bundle, step, full)
    with pytest.raises(xl.BundleError, match="cannot be written: no space left on device"):
        programs["float32"].save(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*.*")} == before
    assert list(copy.parent.iterdir()) == [copy]


def test_a_failed_rename_puts_the_older_bundle_back(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    with pytest.raises(FileNotFoundError):
        bundle._replace(tmp_path / "bundle", tmp_path / "missing", tmp_path / "aside")
    assert (tmp_path / "bundle" / "old").exists()


@pytest.mark.parametrize("place", [None, 3])
def test_what_is_no_path(programs: dict[str, Program], place: Any) -> None:
    for use in (programs["int8"].save, xl.load):
        with pytest.raises(xl.BundleError, match=f"expected the path of a directory, got {place}"):
            use(place)


def test_a_loaded_program_is_not_saved_again(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(xl.BundleError, match="copy its directory"):
        xl.load(saved["int8"]).save(tmp_path / "again")
