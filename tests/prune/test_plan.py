"""Plans: counts from wishes, floors and groups, and the file."""

import json
import random

import pytest
import torch

from moesmith.errors import UserError
from moesmith.prune.criteria import CRITERIA, per_domain
from moesmith.prune.plan import (
    FILE,
    Plan,
    best_of_domains,
    find_super_experts,
    keep_order,
    make_plan,
    smallest_uniform_count,
)  # fmt: skip
from moesmith.prune.sizes import Sizes, measure, parse_fit
from profiles import profile, random_profile

NAME = "model.layers.0.mlp"


@pytest.fixture
def found():
    return random_profile(layers=4, experts=16, top_k=2)


def plan(found, **wish):
    return make_plan(found, **{"super_experts": False, **wish})


def test_keep_takes_the_best_of_every_layer(found):
    result = plan(found, keep=12)
    assert result.count == 12 and set(result.counts.values()) == {12}
    for layer in found.layers:
        score = per_domain(layer, "contribution").mean(0)
        kept, dropped = result.keep[layer.layer], result.drop[layer.layer]
        assert kept == sorted(kept) and sorted(kept + dropped) == list(range(16))
        assert float(score[kept].min()) >= float(score[dropped].max())
        assert result.retained[layer.layer] == pytest.approx(float(score[kept].sum()))


def test_plans_are_nested(found):
    """Fewer experts are a part of more: one ranking, any ratio."""
    for score in CRITERIA:
        larger = plan(found, keep=12, score=score).keep
        for name, kept in plan(found, keep=7, score=score).keep.items():
            assert set(kept) < set(larger[name])


def test_equal_scores_are_settled_by_id():
    result = plan(profile(torch.full((1, 4, 8), 50)), keep=5)
    assert result.keep[NAME] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("cut", "experts", "keep"), [(0.15, 128, 109), (0.25, 16, 12), (0.1, 16, 15), (0.5, 8, 4)]
)
def test_a_cut_never_drops_more_than_asked(cut, experts, keep):
    assert plan(random_profile(layers=1, experts=experts), cut=cut).count == keep


@pytest.mark.parametrize("unit", ["contribution", "prompt_norm"])
@pytest.mark.parametrize("domains", ["mean", "max", {"code": 1.0}])
def test_retain_is_the_smallest_count_that_holds_the_share_everywhere(found, unit, domains):
    result = plan(found, retain=0.9, score=unit, domains=domains)
    assert min(result.retained.values()) >= 0.9
    fewer = plan(found, keep=result.count - 1, score=unit, domains=domains)
    assert min(fewer.retained.values()) < 0.9
    assert result.count == smallest_uniform_count(found, 0.9, unit, domains)
    assert result.meta["unit"] == unit and result.meta["retain"]["decided_by"] in result.keep


def test_retain_in_max_means_the_worst_domain():
    tokens = torch.full((1, 2, 8), 100)
    tokens[0, 0, 0], tokens[0, 1, 0] = 10, 60
    shares = [700 / 710, 700 / 760]
    found = profile(tokens)
    assert plan(found, keep=7, domains="max").retained[NAME] == pytest.approx(min(shares))
    assert plan(found, keep=7, domains="mean").retained[NAME] == pytest.approx(sum(shares) / 2)


def test_the_two_units_of_contribution_disagree():
    """400 tokens of norm 1 against 4 of norm 10: ten to one as a sum over tokens, equal over the document."""
    tokens = torch.tensor([[[400, 4, 400, 4]]])
    found = profile(tokens, torch.tensor([[1.0, 10.0, 1.0, 10.0]]), domains=1, top_k=1)
    assert plan(found, retain=0.9).count == 2
    by_unit = plan(found, retain=0.9).meta["retain"]["keep_by_unit"]
    assert by_unit == {"contribution": 2, "prompt_norm": 4}
    assert plan(found, keep=3, score="reap").meta["unit"] == "contribution"


def test_a_share_no_cut_retains(found):
    with pytest.raises(UserError, match=r"no cut retains 99.99 % of contribution in every layer"):
        plan(found, retain=0.9999)
    with pytest.raises(UserError) as error:
        plan(profile(torch.full((1, 4, 8), 50)), retain=0.9)
    assert "keeps 87.50 %" in str(error.value) and "--retain 87.5%" in str(error.value)


def test_fewer_than_top_k(found):
    with pytest.raises(UserError, match=r"keep 1 is fewer than the 2 experts a token uses"):
        plan(found, keep=1)
    with pytest.raises(UserError, match=r"top-2"):
        plan(found, cut=0.95)
    assert plan(found, keep=2).count == 2
    assert plan(found, retain=0.01).count == 2


@pytest.mark.parametrize("wish", [{"keep": 16}, {"keep": 20}, {"cut": 0.01}, {"cut": 1.0}, {"retain": 1.0}])
def test_wishes_that_are_none(found, wish):
    with pytest.raises(UserError):
        plan(found, **wish)


@pytest.mark.parametrize("wish", [{}, {"keep": 12, "cut": 0.5}])
def test_exactly_one_wish(found, wish):
    with pytest.raises(UserError, match="exactly one"):
        plan(found, **wish)


# ---------------------------------------------------------------- what stays whatever its score


def test_the_best_of_every_domain_are_protected():
    tokens = torch.full((1, 10, 8), 100)
    tokens[0, :, 3] = 0
    tokens[0, 0::5, 3] = 300
    found = profile(tokens, domains=5)
    assert 3 not in plan(found, keep=7).keep[NAME]
    result = plan(found, keep=4, protect=1)
    assert 3 in result.keep[NAME] and 3 in result.meta["protected"][NAME]


def test_protection_that_does_not_fit(found):
    with pytest.raises(UserError, match="has to keep"):
        plan(found, keep=4, protect=10)


def test_nobody_is_protected_for_nothing():
    assert best_of_domains(torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]), 3) == {1}


def test_super_experts_stay_and_late_layers_have_none():
    found = random_profile(layers=8, experts=64)
    for layer in found.layers:
        layer.max_abs[:] = 1.0
    found.layers[0].max_abs[1, 7] = 1000.0
    found.layers[7].max_abs[1, 9] = 2000.0  # the last quarter of the layers always has large outputs
    found.layers[1].max_abs[0, 8] = 150.0  # below a tenth of the largest
    supers = find_super_experts(found.layers)
    assert {name: ids for name, ids in supers.items() if ids} == {NAME: {7}}
    found.layers[0].sums["contribution"][:, 7] = 0
    assert 7 in make_plan(found, keep=8).keep[NAME]
    assert make_plan(found, keep=8).meta["super_experts"] == {NAME: [7]}
    assert 7 not in make_plan(found, keep=8, super_experts=False).keep[NAME]


# ---------------------------------------------------------------- groups and multiples


def test_groups_keep_equally_many():
    found = random_profile(experts=16, n_group=4)
    result = plan(found, keep=8)
    for layer in found.layers:
        kept = result.keep[layer.layer]
        assert [sum(e // 4 == group for e in kept) for group in range(4)] == [2, 2, 2, 2]
        score = per_domain(layer, "contribution").mean(0)
        for group in range(4):
            mine = range(4 * group, 4 * group + 4)
            assert min(score[e] for e in mine if e in kept) >= max(score[e] for e in mine if e not in kept)


def test_a_count_that_does_not_divide_names_the_nearest():
    found = random_profile(experts=16, n_group=4)
    with pytest.raises(UserError, match=r"4 groups.*\n.*8 and 12"):
        plan(found, keep=10)
    assert plan(found, cut=0.3).count == 12, "11.2 rounded up to whole groups, never cutting more"
    assert plan(found, retain=0.5).count % 4 == 0


def test_multiples_round_up(found):
    result = plan(found, keep=9, multiple=4)
    assert result.count == 12 and "9 rounded up to 12, a multiple of 4" in result.meta["notes"]
    assert plan(found, retain=0.6, multiple=8).count == 8
    with pytest.raises(UserError, match="is all 16 experts"):
        plan(found, keep=13, multiple=8)


# ---------------------------------------------------------------- counts per layer


def test_counts_per_layer_have_the_same_total_and_lose_less():
    found = random_profile(layers=6, experts=16, seed=3)
    tokens = torch.stack([layer.per_document["tokens"] for layer in found.layers])
    tokens[0, :, 2:] /= 50  # a layer that two experts carry
    found = profile(tokens)
    uniform, greedy = plan(found, keep=10), plan(found, keep=10, per_layer=True)
    assert sum(greedy.counts.values()) == 60 and greedy.count is None
    assert greedy.counts[NAME] == 4, "the floor of twice top-k"
    assert all(len(greedy.keep[name]) == count for name, count in greedy.counts.items())
    lost = [sum(1 - share for share in p.retained.values()) for p in (uniform, greedy)]
    assert lost[1] < lost[0]


def test_counts_per_layer_that_retain_a_share(found):
    result = plan(found, retain=0.9, per_layer=True)
    assert min(result.retained.values()) >= 0.9
    assert max(result.counts.values()) == plan(found, retain=0.9).count
    assert len(set(result.counts.values())) > 1


def test_counts_per_layer_respect_groups_and_protection():
    found = random_profile(layers=4, experts=16, n_group=4)
    result = plan(found, keep=8, per_layer=True, protect=2)
    assert sum(result.counts.values()) == 32
    for name, kept in result.keep.items():
        assert len({sum(e // 4 == group for e in kept) for group in range(4)}) == 1
        assert set(result.meta["protected"][name]) <= set(kept)


def test_any_wish_gives_a_plan_the_router_can_run():
    """Random settings: floors, groups, forced experts and determinism hold together."""
    draw = random.Random(0)
    for seed in range(40):
        groups = draw.choice([1, 2, 4])
        found = random_profile(3, 4, 16, draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), groups, seed=seed)
        options = dict(
            score=draw.choice(list(CRITERIA)),
            domains=draw.choice(["mean", "max"]),
            protect=draw.choice([0, 1]),
            per_layer=draw.random() < 0.3,
            multiple=draw.choice([1, 2]),
        )
        try:
            result = make_plan(found, keep=draw.choice([4, 8, 12]), **options)
        except UserError as error:
            assert "has to keep" in error.message
            continue
        assert result == make_plan(found, keep=result.meta["asked"]["keep"], **options)
        for layer in found.layers:
            kept = result.keep[layer.layer]
            assert layer.top_k <= len(kept) == result.counts[layer.layer]
            per_group = [sum(e // (16 // groups) == g for e in kept) for g in range(groups)]
            assert len(set(per_group)) == 1
            for forced in ("protected", "super_experts"):
                assert set(result.meta[forced].get(layer.layer, [])) <= set(kept)


def test_order_without_groups_is_by_score():
    assert keep_order(torch.tensor([0.1, 0.4, 0.4, 0.2]), {0}) == [0, 1, 2, 3]


# ---------------------------------------------------------------- the file


def test_a_plan_reads_back_as_written(found, tmp_path):
    result = make_plan(found, keep=12, score="reap", domains={"code": 2.0}, protect=1)
    assert result.write(tmp_path) == tmp_path / FILE
    assert Plan.read(tmp_path) == result == Plan.read(tmp_path / FILE)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["method"] == {"score": "reap", "domains": {"code": 2.0}, "merge": None}
    assert content["profile"]["corpus_hash"] == "c" and content["versions"]["torch"]
    layer = content["layers"][NAME]
    assert len(layer["scores"]) == 16 and len(layer["drop"]) == 4


def test_files_that_are_no_plan(found, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Plan.read(tmp_path / "nothing.json")
    make_plan(found, keep=12).write(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ("not json", "[]", json.dumps({**content, "format": 99})):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(UserError, match="not a plan"):
            Plan.read(tmp_path / "wrong.json")
    del (less := json.loads(json.dumps(content)))["layers"][NAME]["drop"]
    (tmp_path / "wrong.json").write_text(json.dumps(less))
    with pytest.raises(UserError, match="not a plan"):
        Plan.read(tmp_path / "wrong.json")
    content["layers"][NAME]["keep"].append(99)
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not its experts"):
        Plan.read(tmp_path / "wrong.json")


# ---------------------------------------------------------------- sizes


SIZES = Sizes(16, 16_000_000, 1_000_000, 1000, 32_000_000, 2_002_000)


def test_the_largest_count_that_fits():
    assert SIZES.stored == SIZES.nbytes(16, "bf16") == SIZES.stored_with(16) == 34_002_000
    for storage in ("bf16", "q8", "q4", "nf4", None):
        exact = SIZES.nbytes(10, storage) if storage else SIZES.stored_with(10)
        assert SIZES.largest_count(exact, storage) == 10
        assert SIZES.largest_count(exact - 1, storage) == 9
        assert SIZES.largest_count(exact, storage, step=4) == 8
    assert SIZES.nbytes(16, "q4") == 17_000_000 * 4.5 / 8 + 2000


def test_sizes_that_cannot_be_met():
    with pytest.raises(UserError, match="all 16 experts fit already"):
        SIZES.largest_count(40e6, "bf16")
    with pytest.raises(UserError, match=r"even 2 experts per layer take 0.006 GB"):
        SIZES.largest_count(5e6, "bf16", fewest=2)


def test_a_checkpoints_bytes_are_sorted(checkpoint):
    from moesmith.models.anatomy import dissect, meta_model
    from moesmith.models.checkpoint import Checkpoint

    for family in ("olmoe", "mixtral", "gemma4", "gpt_oss", "granitemoe", "deepseek_v3"):
        opened = Checkpoint.open(checkpoint(family))
        anatomy = dissect(meta_model(opened.config))
        sizes = measure(opened.tensors, 8)
        assert sizes.stored == opened.nbytes
        assert sizes.expert_weights == anatomy.experts, family
        rest = sizes.matrix_weights + sizes.other_weights
        assert rest == pytest.approx(anatomy.total - anatomy.experts, rel=0.01), family


def test_a_size_and_its_storage():
    assert parse_fit("14GB@q4") == (14e9, "q4")
    assert parse_fit("1.5 gib") == (1.5 * 2**30, None)
    for wrong in ("14", "GB", "14GB@q3", "14XB", "14GB@"):
        with pytest.raises(UserError, match="14GB@q4"):
            parse_fit(wrong)
