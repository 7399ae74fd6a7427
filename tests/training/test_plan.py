"""The plan counts the parameters of the released models without their weights."""

import re
from pathlib import Path

import pytest
import torch

from mmtensorar.backbones import janus
from mmtensorar.model import layers
from mmtensorar.recipe import Recipe
from mmtensorar.recipe.__main__ import main
from mmtensorar.training import plan
from tests.helpers.fakes import write_tiny_janus

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


# Parameters of language model, generation embeddings, aligner and head, counted on the
# released configurations.
@pytest.mark.plan
@pytest.mark.parametrize("size, expected", [("1b", 1_485_053_952), ("7b", 6_591_791_104)])
def test_backbone_counts_are_the_released_models(size, expected):
    recipe = Recipe.load(RECIPES / f"janus_pro_{size}.yaml")
    model = plan.meta_model(recipe)
    assert all(parameter.is_meta for parameter in model.parameters()), "a plan must not allocate the model"
    counts = plan.parameters(model)
    assert counts["backbone"] == expected
    # Two attention-sized modules have a little more than 8 D^2 parameters, about the
    # paper's 8.6 D^2.
    assert 8 <= counts["tensorar"] / model.backbone.dim**2 <= 8.6
    assert counts["trainable"] == counts["backbone"] + counts["tensorar"]


# Parameters of the released models, and the percentage that TensorAR adds according to
# the paper (its class-conditional table).
@pytest.mark.plan
@pytest.mark.parametrize(
    "name, expected, most",
    [
        ("llamagen/b_256", 110_888_448, 4.6),
        ("llamagen/l_256", 342_910_976, 2.7),
        ("llamagen/xl_384", 774_699_520, 1.9),
        ("llamagen/xxl_384", 1_410_972_672, 1.5),
        ("open_magvit2/b_256", 343_570_432, 2.7),
        ("open_magvit2/l_256", 804_362_240, 2.0),
        ("open_magvit2/xl_256", 1_486_679_040, 2.0),  # not in the table
    ],
)
def test_the_recipes_keep_to_the_papers_budget(name, expected, most, tmp_path, monkeypatch, capsys):
    """Read from the printed plan at depth 1, without any file of the model on this
    machine.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "activation_bytes", lambda recipe, numbers: {})
    assert main([str(RECIPES / f"{name}.yaml"), "--plan"]) == 0
    printed = capsys.readouterr().out
    backbone, added, share = re.search(
        r"backbone +([\d,]+)\s+TensorAR +([\d,]+) +\(\+(.*)%\)", printed
    ).groups()
    backbone, added = (int(number.replace(",", "")) for number in (backbone, added))
    assert backbone == expected
    assert 0 < 100 * added / backbone <= most and float(share) == pytest.approx(
        100 * added / backbone, abs=0.01
    )


def test_flops_of_a_factorised_head():
    """Six FLOPs per weight and token; the weights of the factorised blocks see three
    positions per token.
    """
    plain = Recipe.load(
        RECIPES / "open_magvit2" / "b_256.yaml",
        ["tensorar.window=1", "tensorar.offset_weights=null", "train.activation_checkpointing=false"],
    )
    tokens, flops = plan.flops_per_step(plain, recomputed=False)
    backbone = plan.parameters(plan.meta_model(plain))["backbone"]
    assert flops / (6 * backbone * tokens) == pytest.approx(1.15, abs=0.1)


def bytes_of(
    stage: int, trained: int = 800, precision: str = "bf16", num_gpus: int = 8, **settings
) -> plan.Memory:
    """Bytes for 800 parameters, some of them trained, with two micro-batches per
    step.
    """
    changes = [f"zero.stage={stage}", f"train.precision={precision}", "train.grad_accum=2"]
    recipe = Recipe.load(
        RECIPES / "janus_pro_7b.yaml", changes + [f"{key}={value}" for key, value in settings.items()]
    )
    counts = {"backbone": 800, "tensorar": 0, "trainable": trained, "four_bit": 0}
    return plan.memory(recipe, counts, 100, 0.0, num_gpus)


def test_zero_memory_on_paper():
    """16 bytes per parameter.

    Stage 1 shares 12 of them between the ranks, stage 2 14, stage 3 all 16.
    """
    assert [bytes_of(stage).held for stage in range(4)] == [16 * 800, 4 * 800 + 1200, 2 * 800 + 1400, 1600]
    assert bytes_of(0, trained=0).held == 1600, "frozen weights have no state"
    assert bytes_of(0, precision="fp32").held == 16 * 800
    offloaded = bytes_of(2, **{"zero.offload_optimizer": "cpu", "optim.name": "cpu_adam"})
    assert offloaded.held == 1600 and offloaded.host == (4 + 12 + 2 * 2) * 100, (
        "gradients in float32, and two copies in bfloat16"
    )
    assert bytes_of(0, **{"optim.name": "adamw_8bit"}).optimizer == 6 * 800


def test_peak_memory_is_that_of_the_backward_pass_or_of_the_update():
    few = bytes_of(0)
    assert few.peak == few.held + few.update
    many = few._replace(activations=10**9)
    assert many.peak == many.held + 10**9 + many.buffers


@pytest.mark.plan
def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    def active(rows: int, *changes: str) -> int:
        return plan.activation_bytes(Recipe.load(RECIPES / "llamagen/b_256.yaml", changes), [rows])[rows]

    kept, selected, again = (
        active(2, f"train.activation_checkpointing={policy}") for policy in ("false", "selective", "true")
    )
    assert again < 0.9 * selected < 0.9 * 0.9 * kept
    # From some batch size on, memory is linear in the batch size, and the plan
    # extrapolates it.
    few = Recipe.load(
        RECIPES / "tiny/tensorar.yaml", [f"backbone.path={RECIPES / 'tiny/weights/base/backbone'}"]
    )
    assert plan.activation_bytes(few, [40])[40] == pytest.approx(plan._activation_bytes(few, 40), rel=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Recipes for a model with a few layers, whose FLOPs are counted in less than a
    second.
    """
    folder = tmp_path_factory.mktemp("plan")
    write_tiny_janus(folder / "janus", num_codes=256, side=8, width=64)
    common = [f"backbone.path={folder / 'janus'}", "tensorar.num_heads=2"]
    return lambda *changes: Recipe.load(RECIPES / "tiny/tensorar.yaml", [*common, *changes])


@pytest.mark.plan
def test_flops_of_a_step_are_near_six_per_weight_and_token(tiny):
    """At window 1 the FLOPs are 6 N per token for the transformer, plus attention and
    the tokens of the prompt.
    """
    recipe = tiny("tensorar.window=1")
    tokens, flops = plan.flops_per_step(recipe, prompt_len=1, recomputed=False)
    model = plan.meta_model(recipe)
    assert tokens == recipe.data.batch_size * model.backbone.num_tokens
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    weights = plan.parameters(model)["backbone"] - tables
    assert flops / (6 * weights * tokens) == pytest.approx(1.1, abs=0.1)


def test_other_prompt_lengths_follow_exactly_from_three(tiny):
    """The step log needs the FLOPs for every prompt length, but counting one length
    takes a second.

    Lengths that were not counted follow exactly from three that were.
    """
    state = torch.get_rng_state()
    flops = plan.SampleFlops(tiny(), recomputed=False)
    for prompt_len in (3, 12, 20):
        flops(prompt_len)
    assert [flops(7), flops(31)] == [flops.count(7), flops.count(31)] and len(flops.counted) == 3
    assert flops(7) < flops(12) < flops(31)
    assert torch.equal(state, torch.get_rng_state()), "a count draws no random numbers"


@pytest.mark.plan
@pytest.mark.parametrize(
    "name, parts", [("tiny/tensorar", "lora"), ("llamagen/b_256", "heads"), ("open_magvit2/b_256", "all")]
)
def test_flops_of_equal_layers_follow_exactly_from_two(name, parts, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    recipe = Recipe.load(RECIPES / f"{name}.yaml", [f"train.parts={parts}"])
    flops = plan.SampleFlops(recipe, recomputed=True)
    found = flops.count(flops.typical_prompt_len)
    stacks = plan._stacks(flops.model)
    assert stacks and all(len(stack) > 2 for stack in stacks.values())
    monkeypatch.setattr(plan, "_stacks", lambda model: {})
    assert found == flops.count(flops.typical_prompt_len)


@pytest.mark.plan
def test_recomputation_counts_in_the_flops(tiny):
    """The loss in chunks computes decoder and head a fourth time; activation
    checkpointing does the same to the layers.
    """
    plain = ["tensorar.window=4", "tensorar.schedule=exponential"]

    def flops(*settings: str) -> int:
        return plan.flops_per_step(tiny(*plain, *settings))[1]

    once, again = "train.loss_chunk_tokens=1000000000", "train.activation_checkpointing=true"
    complete, chunked, checkpointed = flops(once), flops(), flops(once, again)
    model = plan.meta_model(tiny(*plain))
    sizes = {
        name: sum(p.numel() for p in part.parameters() if p.ndim > 1)
        for name, part in (
            ("head", model.backbone.head),
            ("decoder", model.decoder),
            ("layers", model.backbone.language_model.layers),
        )
    }
    tokens = tiny().data.batch_size * model.backbone.num_tokens
    assert chunked - complete == pytest.approx(
        2 * tokens * (4 * sizes["head"] + 5 * sizes["decoder"]), rel=0.06
    )
    # The tolerance covers attention, which costs nearly as much as the weights of such
    # narrow layers, and the prompt.
    assert 1 < (checkpointed - complete) / (2 * tokens * sizes["layers"]) < 2.2
    assert plan.flops_per_step(tiny(*plain, again), recomputed=False)[1] == complete


@pytest.mark.plan
def test_self_drafts_cost_one_more_forward_pass(tiny):
    """Self-drafts add one forward pass: a third of a step that recomputes nothing,
    except for the head, which runs over the first slot of every window only.
    """
    shares = [tiny(f"tensorar.self_drafts={share}") for share in (0, 1)]
    plain, drafted = (plan.flops_per_step(recipe, recomputed=False)[1] for recipe in shares)
    model = plan.meta_model(shares[0])
    head = sum(p.numel() for p in model.backbone.head.parameters() if p.ndim > 1)
    tokens = shares[0].data.batch_size * model.backbone.num_tokens
    assert drafted - plain == pytest.approx(plain / 3 - 2 * tokens * head, rel=0.03)


@pytest.mark.plan
def test_the_report_loads_no_weights(monkeypatch):
    """A plan must also work where the model was never downloaded."""
    for name in ("fill", "locate"):
        monkeypatch.setattr(janus, name, lambda *a, **k: pytest.fail("files were read"))
    text = plan.report(Recipe.load(RECIPES / "janus_pro_7b.yaml"), activations=False)
    assert "6,591,791,104" in text and "64 GPUs" in text and "FLOPs" in text


def test_a_plan_without_files_names_the_settings_it_needs(tmp_path, monkeypatch, capsys):
    """The released sizes are known, but a missing file does not show which size it is:
    the recipe must set it.
    """
    monkeypatch.chdir(tmp_path)
    for name, unsaid in (("llamagen", ["size", "image_size"]), ("open_magvit2", ["size"])):
        path, keys = f"models/{name}.ckpt", ", ".join(f"backbone.{key}" for key in unsaid)
        changes = [f"backbone.path={path}", *(f"backbone.{key}=null" for key in unsaid)]
        assert main([str(RECIPES / name / "b_256.yaml"), *changes, "--plan"]) == 2
        said = f"no file {path}; to plan a released model without its file, set {keys}\n"
        assert capsys.readouterr().err.endswith(f"error: backbone.path: {said}")


def test_a_plan_for_flash_attention_needs_no_gpu():
    recipe = Recipe.load(RECIPES / "llamagen/b_256.yaml", ["backbone.attn_implementation=flash_attention_2"])
    assert plan.activation_bytes(recipe, [1])[1] > 0


def test_an_average_of_the_weights_is_counted_in_memory():
    assert bytes_of(3, **{"train.ema_decay": 0.99}).optimizer == bytes_of(3).optimizer + 4 * 100


@pytest.mark.plan
def test_a_plan_leaves_nothing_behind():
    """Planning once left tables of the layers without values, and the next training in
    the same process failed on them.
    """
    layers.rotary_table.cache_clear()
    recipe = Recipe.load(RECIPES / "llamagen/b_256.yaml")
    plan.activation_bytes(recipe, [1])
    assert layers.rotary_table.cache_info().currsize == 0
