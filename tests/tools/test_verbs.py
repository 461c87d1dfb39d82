"""What each verb does with a small model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.tools.conftest import TINY
from xlathe.passes import PASSES
from xlathe.tools.main import main

TOKENS = np.random.default_rng(0).integers(0, 4096, (2, 16), dtype=np.int32)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs words that are right; returns what was printed."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    return out


def test_passes_lists_every_pass_with_every_option(capsys):
    listed = [line.split()[0] for line in run(capsys, "passes").splitlines()]
    expected = []
    for name, cls in PASSES.items():
        expected += [name, *(f"{field.name}:" for field in dataclasses.fields(cls))]
    assert listed == expected


def test_opt_saves_what_the_pipeline_gives(tiny, tiny_folder, tmp_path, capsys):
    text = "canonicalize,fuse_attention,quantize{scheme=int8}"
    out = run(capsys, "opt", tiny_folder, tmp_path / "int8", f"--passes={text}")

    expected = xl.Pipeline.parse(text, PASSES)(tiny)
    found = xl.load_graph(tmp_path / "int8")
    np.testing.assert_array_equal(found(TOKENS), expected(TOKENS))
    assert expected.report().splitlines()[1] in out.splitlines()  # sizes


def test_a_bundle_has_no_plan(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["inspect", str(tmp_path), "--plan", "--config=int8"]) == 2
    assert "is a bundle, which has a manifest alone" in capsys.readouterr().err


def test_opt_verifies_and_dumps(tiny_folder, tmp_path, capsys):
    dump = tmp_path / "dump"
    run(capsys, "opt", tiny_folder, tmp_path / "out", "--config=float32", "--verify", f"--dump={dump}")
    names = [path.name for path in sorted(dump.iterdir())]
    assert names == ["00_input.py", "01_canonicalize.py", "02_fuse_attention.py"]


def test_opt_prints_what_changed(tiny_folder, tmp_path, capsys):
    words = ["opt", tiny_folder, tmp_path / "out", "--passes=fuse_attention", "--print_after_change"]
    assert "--- 1: fuse_attention" in run(capsys, *words)


def test_opt_prints_what_quantizers_will_do_before_they_do_it(tiny, tiny_folder, tmp_path, capsys):
    """Before: two quantizers, and a NaN that ends the second one after its first section. Expected: the plan of each,
    as text and in a file; what was finished is told, and gone once the same command ended well."""
    text, out, plans = tmp_path / "text.py", tmp_path / "out", tmp_path / "plans.json"
    text.write_text("def read_file(path):\n    return path.read_text()\n" * 8)
    weight = np.array(tiny.weights["layers/0/feed_forward/down/kernel"])
    weight[3, 5] = np.nan
    tiny.with_weights({"layers/0/feed_forward/down/kernel": weight}).save(tmp_path / "model")
    passes = '--passes=quantize{scheme=int8,weights=".*/key/.*"},quantize{scheme="int4:g32",method=gptq}'
    words = [str(each) for each in ("opt", tmp_path / "model", out, passes, f"--calibration={text}", f"--plan={plans}")]

    assert main(words) == 1
    told, err = capsys.readouterr()
    assert "down/kernel has 1 of 1024 values that are not finite" in err and not out.exists()
    first, second = xl.passes.Quantize("int8", weights=".*/key/.*"), xl.passes.Quantize("int4:g32", method="gptq")
    expected = [first.plan(tiny), second.plan(first(tiny))]
    assert told.startswith(f"{expected[0]}\n{expected[1]}\npeak about ")
    assert f"{out}.unfinished keeps 1 finished sections: the same command goes on from there" in told
    written = json.loads(plans.read_text())
    assert written[1].pop("peak")["total"] > 0
    assert written == [json.loads(plan.to_json()) for plan in expected]

    tiny.save(tmp_path / "model")
    assert "went on after 1 of 3 sections" in run(capsys, *words)
    assert not Path(f"{out}.unfinished").exists()


def test_passes_calibrate_on_a_text_or_are_refused(tiny_folder, tmp_path, capsys):
    assert main(["opt", str(tiny_folder), str(tmp_path / "pruned"), "--config=pruned"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "activation}: score='activation' needs calibration tokens" in line and "--calibration=FILE" in line
    text = tmp_path / "text"
    text.write_text("def read_file(path):\n    return path\n" * 20)
    passes = "--passes=canonicalize,fuse_attention,quantize{method=search}"
    words = [str(tiny_folder), str(tmp_path / "out"), passes, f"--calibration={text}"]
    assert "quantize{method=search}" in run(capsys, "opt", *words)
    assert "3 programs" in run(capsys, "compile", words[0], str(tmp_path / "bundle"), *words[2:], "--max_len=24")
    text.write_text("")
    assert main(["opt", *words]) == 1
    assert "the text has no tokens" in capsys.readouterr().err
    text.unlink()
    assert main(["opt", *words]) == 1
    assert f"--calibration={text} cannot be read: No such file or directory" in capsys.readouterr().err
    assert main(["eval", words[0], f"--text={text}"]) == 1
    assert f"--text={text} cannot be read: No such file or directory" in capsys.readouterr().err


def test_inspect_reports_on_a_graph_or_prints_it(tiny, tiny_folder, capsys):
    assert run(capsys, "inspect", tiny_folder) == tiny.report() + "\n"
    assert "def graph(" in run(capsys, "inspect", tiny_folder, "--text")


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["compile", str(tiny_folder), str(folder), "--max_len=24"]) == 0
    return folder


def test_a_compiled_bundle_generates_what_the_graph_would(tiny, bundle, capsys):
    out = run(capsys, "generate", bundle, "def read", "--max_tokens=4")

    prompt = tiny.tokenizer.encode("def read", add_special_tokens=False).ids
    ids = [*prompt, 0, 0, 0, 0]
    for i in range(len(prompt), len(ids)):
        ids[i] = int(np.argmax(tiny([ids])[0, i - 1]))
    assert out == tiny.tokenizer.decode(ids[len(prompt) :]) + "\n"


def test_generate_passes_its_flags_on(bundle, capsys):
    words = ["generate", bundle, "def read", "--max_tokens=8", "--temperature=1", "--top_k=50", "--top_p=0.9"]
    first, same, other = (run(capsys, *words, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == same != other
    assert run(capsys, *words, "--seed=1", f"--stop={first[:4]}", "--stop=never") == "\n"


def test_generate_refuses_what_does_not_fit(bundle, capsys):
    assert main(["generate", str(bundle), "def", "--max_tokens=24"]) == 1
    assert "max_len=24" in capsys.readouterr().err


def test_inspect_prints_the_manifest_of_a_bundle(bundle, capsys):
    assert json.loads(run(capsys, "inspect", bundle)) == json.loads((bundle / "manifest.json").read_text())


def test_compile_plans_a_model_of_which_there_are_but_sizes(tmp_path, capsys):
    config, plan = tmp_path / "llama.json", tmp_path / "plan.json"
    config.write_text(json.dumps(dataclasses.asdict(TINY)))
    words = ["compile", config, plan, "--shapes_only", "--max_len=64", "--target=tpu-v5e", "--memory=1.5MB"]
    out = run(capsys, *words, "--config=int8")
    figures = json.loads(plan.read_text())
    assert figures["memory_bytes"] == 1_500_000 and figures["cache_bytes_per_token"] == 2 * 16 * 4
    assert figures["fits"] and figures["weights_bytes"] < 200_000
    assert "largest batch" in out and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "expected an object with the fields vocab, width"),
        ('{"vocap": 1}', "no field 'vocap'; did you mean 'vocab'?"),
        ('{"vocab": "1"}', "vocab must be a positive int, got '1'"),
        ('{"vocab": 1}', "missing 6 required"),
    ],
)
def test_a_wrong_file_of_sizes_is_one_error(tmp_path, capsys, text, message):
    config = tmp_path / "llama.json"
    config.write_text(text)
    assert main(["compile", str(config), str(tmp_path / "plan"), "--shapes_only", "--max_len=64"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--memory=lots", "--memory=lots: expected a number of GB, MB, GiB, MiB, as in 48GB"),
        ("--target=tpu-v5", "no target 'tpu-v5'; did you mean 'tpu-v5"),
        ("--memory=100MB", "llama.json has sizes and no weights: it can be planned"),
    ],
)
def test_compile_refuses(tmp_path, capsys, flag, message):
    (tmp_path / "llama.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    shapes = [] if flag == "--memory=100MB" else ["--shapes_only", "--max_len=64"]
    assert main(["compile", str(tmp_path / "llama.json"), str(tmp_path / "out"), *shapes, flag]) > 0
    assert message in capsys.readouterr().err


def test_compile_refuses_a_scheme_before_passes_run(tmp_path, capsys):
    words = ["compile", str(tmp_path / "none"), str(tmp_path / "out"), "--target=tpu-7x"]
    assert main([*words, '--passes=quantize{scheme="int8:channel,a=int8_token",method=gptq}']) == 1
    assert "tpu-7x multiplies no int8, which activations are rounded to; use a=fp8_token" in capsys.readouterr().err


def test_what_does_not_fit_is_planned_and_not_saved(tiny_folder, tmp_path, capsys):
    words = ["compile", tiny_folder, tmp_path / "out", "--max_len=24", "--memory=0.1MB", f"--json={tmp_path / 'plan'}"]
    assert main(list(map(str, words))) == 1
    out, err = capsys.readouterr()
    assert "does not fit cpu: needs " in err and "has 100.00 kB; largest that fit: a batch of 0" in err
    assert "temporaries" in out and not json.loads((tmp_path / "plan").read_text())["fits"]
    assert not (tmp_path / "out").exists()


def test_inspect_prints_the_plan_of_a_quantizer(tiny, tiny_folder, capsys):
    """Expected: the plan of the pass on the graph as it arrives there, as lines and as JSON; nothing else beside it."""
    words = ["inspect", tiny_folder, "--plan", "--passes=canonicalize,quantize{scheme=nvfp4}"]
    plan = xl.passes.Quantize("nvfp4").plan(tiny)
    assert run(capsys, *words) == f"{plan}\n"
    assert json.loads(run(capsys, *words, "--json")) == json.loads(plan.to_json())
    for wrong in (["--plan"], ["--config=nvfp4"], ["--json"]):
        assert main(["inspect", str(tiny_folder), *wrong]) == 2
        assert "--plan goes with --passes or --config" in capsys.readouterr().err


def test_inspect_prints_what_a_budget_became(tiny, tiny_folder, tmp_path, capsys):
    """Expected: the plan, and below it a pass whose plan is the same."""
    text = tmp_path / "text.py"
    text.write_text("def read_file(path):\n    return path.read_text()\n" * 8)
    budget = 'budget{bits=7,schemes=("int4:channel","int8:channel",),method=rtn}'
    words = ["inspect", tiny_folder, "--plan", f"--calibration={text}", f"--passes={budget}"]
    plan, _, chosen = run(capsys, *words).rpartition("chosen: ")
    (quantize,) = xl.Pipeline.parse(chosen.strip(), xl.passes.PASSES).passes
    assert plan == f"{quantize.plan(tiny)}\n" and len(quantize.rules) == 2
    assert json.loads(run(capsys, *words, "--json")) == json.loads(quantize.plan(tiny).to_json())



def test_every_preset_is_a_pipeline():
    import pkgutil

    from xlathe import configs
    from xlathe.tools.source import preset

    for module in (each for each in pkgutil.iter_modules(configs.__path__) if not each.ispkg):
        pipeline = preset(module.name)
        assert str(xl.Pipeline.parse(str(pipeline), PASSES)) == str(pipeline)
