"""The terms of an objective, which features stand for each other, vocabularies, and rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from tests.passes.distill.models import VOCAB, student, teacher, tokens
from xlathe.errors import CheckpointError, OptionError
from xlathe.passes.distill import losses
from xlathe.passes.distill.features import Kept, pair_features
from xlathe.passes.distill.objective import Objective, Seen, Taught
from xlathe.passes.distill.rows import Rows
from xlathe.passes.distill.stored import INDEX, store_teacher
from xlathe.passes.distill.vocabularies import check_vocabularies
from xlathe.passes.prune.depth import without_layers
from xlathe.passes.prune.plan import Cost, Group, PrunePlan
from xlathe.sections import layers

RNG = np.random.default_rng(0)
OWN, OTHER = RNG.normal(size=(2, 2, 5, 20)).astype(np.float32)
NEXT = RNG.integers(0, 20, (2, 5), dtype=np.int32)


def test_terms_are_added_up_times_their_weights() -> None:
    text = "forward_kl{weight=0.5,temperature=2.0},cross_entropy{weight=2.0},features{measure=cosine}"
    objective = Objective.parse(text)
    assert str(objective) == text and objective.needs_logits and objective.needs_features
    found = objective.values(Seen(jnp.array(OWN), (OWN, OTHER)), Taught(OTHER, None, (OTHER, OTHER)), NEXT)
    expected = 0.5 * losses.forward_kl(OWN, OTHER, 2.0) + 2 * losses.cross_entropy(OWN, NEXT)
    np.testing.assert_allclose(found, expected + losses.cosine_distance(OWN, OTHER) / 2, rtol=1e-5, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    seen, taught = Seen(jnp.array(OWN), (OWN,)), Taught(OWN, None, (OWN,))
    found = Objective.parse("forward_kl,reverse_kl,jsd,top_k{k=7},features").values(seen, taught, NEXT)
    np.testing.assert_allclose(found, np.zeros((2, 5)), atol=1e-5)


def test_ids_that_both_have_are_compared() -> None:
    for text, expected in (
        ("forward_kl", losses.forward_kl(OWN[..., :15], OTHER[..., :15])),
        ("top_k{k=3}", losses.top_k_kl(OWN[..., :15], losses.top_k(OTHER[..., :15], 3))),
    ):
        found = Objective.parse(text).values(Seen(jnp.array(OWN)), Taught(OTHER[..., :15]), NEXT)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "text", ["", "kl", "jsd{beta=-0.1}", "top_k{k=0}", "forward_kl{temperature=0.0}", "features{weight=-1.0}"]
)
def test_objectives_that_are_none(text: str) -> None:
    with pytest.raises(OptionError):
        Objective.parse(text)


def test_layers_that_pruning_kept_are_compared() -> None:
    """Without its second layer a student's first one ends where the teacher's second does."""
    whole = teacher(layers=4)
    shallow = without_layers(whole, (1,))
    with pytest.raises(OptionError, match=r"the student has 3 layers and 4 of the teacher's 4 are kept"):
        pair_features(shallow, whole, Kept())
    pairs = pair_features(shallow, whole, Kept(removed=(1,)))
    ends = [end for _, end in layers(whole)]
    assert pairs.teacher == (ends[1], ends[2], ends[3])
    assert pairs.student == tuple(end for _, end in layers(shallow))


def test_what_is_kept_after_several_plans() -> None:
    plan = PrunePlan((), (1,), (), Cost(1, 1, 1), Cost(1, 1, 1))
    assert Kept().then(plan, 4) == Kept(removed=(1,))
    assert Kept().then(plan, 4).then(plan, 4) == Kept(removed=(1, 2))  # the second of the layers 0, 2 and 3


def test_a_plan_of_another_model() -> None:
    size = Cost(1, 1, 1)
    with pytest.raises(OptionError, match="another model: it removes layer 9, and 4 of the teacher's 4 are left"):
        Kept().then(PrunePlan((), (9,), (), size, size), 4)
    with pytest.raises(OptionError, match="another model: it removes layer 1 of 3, and 4 of the teacher's 4 are left"):
        Kept().then(PrunePlan((), (1,), (0.1, 0.2, 0.3), size, size), 4)
    wide = PrunePlan((Group("hidden", 9, (), (1, 3), ()),), (), (), size, size)
    with pytest.raises(OptionError, match="another model: it keeps 2 of 9 features of the stream, and 8 are left"):
        Kept(width=tuple(range(8))).then(wide, 4)
    with pytest.raises(OptionError, match="it keeps feature 32 of a residual stream, and the teacher's has 32"):
        pair_features(teacher(), teacher(), Kept(width=tuple(range(1, 33))))


def test_another_width_needs_a_plan() -> None:
    with pytest.raises(OptionError, match=r"stream has 32 features, the teacher's 48.*--plan=FILE"):
        pair_features(student(), teacher(width=48), Kept())
    pairs = pair_features(student(), teacher(width=48), Kept(width=tuple(range(8, 40))))
    assert pairs.kept.width == tuple(range(8, 40))


def test_vocabularies() -> None:
    check_vocabularies(student(), teacher())
    wide = teacher(vocab=64)
    with pytest.raises(OptionError, match=r"61 logits a token and the teacher 64; .*--shared_vocab"):
        check_vocabularies(student(), wide)
    check_vocabularies(student(), wide, shared=True)
    own, other = (Tokenizer(models.WordLevel({"a": 0, name: 1}, unk_token="a")) for name in ("b", "c"))
    with pytest.raises(OptionError, match="different tokenizers: 1 of the student's 2 tokens"):
        check_vocabularies(student().replace(tokenizer=own), teacher().replace(tokenizer=other))


def test_rows_hold_every_token_but_the_first_once_an_epoch() -> None:
    ids = np.arange(100, 131, dtype=np.int32)
    rows = Rows.cut(ids, 8)
    assert rows.tokens.shape == (4, 9) and rows.mask.sum() == 30
    for epoch in range(2):
        seen = [rows.at(step, 2, seed=3) for step in (2 * epoch, 2 * epoch + 1)]
        learned = np.concatenate([tokens[:, 1:][mask] for tokens, mask, _ in seen])
        np.testing.assert_array_equal(np.sort(learned), ids[1:])
    assert any((rows.at(0, 4, seed)[2] != rows.at(0, 4, 3)[2]).any() for seed in range(3))
    with pytest.raises(OptionError, match="the text has 1 tokens"):
        Rows.cut(ids[:1], 8)


def test_a_stored_teacher_is_read_back_and_checked(tmp_path) -> None:
    rows = Rows.cut(tokens(60), 8)
    stored = store_teacher(teacher(), rows, 5, 1.5, tmp_path)
    found = stored.at(np.array([6, 0]))
    expected = losses.top_k(teacher()(rows.tokens[[6, 0], :-1]), 5, 1.5)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-3)
    np.testing.assert_allclose(found.rest, expected.rest, atol=2e-3)
    assert sum(t.nbytes for t in stored.shards[0].values()) == rows.mask.size * (5 * 4 + 2)
    for change in ({"k": 6}, {"temperature": 1.0}, {"rows": Rows.cut(tokens(60, seed=1), 8)}):
        options = {"rows": rows, "k": 5, "temperature": 1.5} | change
        with pytest.raises(CheckpointError, match="said of something else"):
            store_teacher(teacher(), folder=tmp_path, **options)
    with pytest.raises(OptionError, match=f"k=62: expected 1 to {VOCAB}"):
        store_teacher(teacher(), rows, VOCAB + 1, 1.0, tmp_path / "new")
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="is no index of a teacher"):
        store_teacher(teacher(), rows, 5, 1.5, tmp_path)
