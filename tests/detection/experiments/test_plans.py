"""The grids behind the paper's tables, its own figures, and the plans of the presets."""

from __future__ import annotations

import pytest

from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.config import config_diff
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.experiments import paper
from ioubal_kernels.experiments.grid import TABLES
from ioubal_kernels.experiments.plans import SyntheticSet, make_plan


@pytest.mark.parametrize("name", TABLES)
def test_the_grid_has_the_papers_rows_and_arms(name):
    rows = {row.name: [arm.name for arm in row.arms] for row in TABLES[name].rows}
    assert set(rows) == set(paper.TABLES[name])
    for row, arms in rows.items():
        assert arms[0] == "baseline"
        assert set(paper.TABLES[name][row]) <= set(arms)
        own = {"baseline", "control", "eq7"}
        assert set(arms) - own <= set(paper.TABLES[name][row])
        assert "control" in arms or arms == ["baseline"]


def test_the_papers_figures_add_up_to_what_its_text_says():
    def gains(table: str, metric: str) -> list[float]:
        found = paper.TABLES[table].values()
        return [round(arms["both"][metric] - arms["baseline"][metric], 1) for arms in found if "both" in arms]

    assert sorted(set(gains("table1", "AP"))) == [1.0, 1.1, 1.3, 1.7]
    assert (min(gains("table1", "AP50")), max(gains("table1", "AP50"))) == (0.1, 0.8)
    assert (min(gains("table1", "AP75")), max(gains("table1", "AP75"))) == (1.0, 2.4)
    assert gains("table2", "AP") == [1.3]
    assert (min(gains("table4", "AP")), max(gains("table4", "AP"))) == (1.1, 1.4)
    assert (min(gains("table5", "AP")), max(gains("table5", "AP"))) == (1.3, 1.5)
    assert sorted(gains("table6", "AP")) == [1.0, 1.2]
    assert gains("table7", "AP") == [0.6]
    assert paper.figures("table3", "retinanet_r50", "lambda-1.8") == {"AP": 35.1}
    assert paper.figures("table3", "retinanet_r50", "eq7") == {}


def test_options_are_the_rows_and_the_arms_go_first():
    """An exponent given for all is the IoU-balanced arms': the baseline stays one."""
    plan = make_plan("table2", seeds=1, options={"loss.eta": 1.2, "loss.lambda_": 1.0, "optim.lr": 0.5})
    settings = {job.arm: (job.config.loss.eta, job.config.loss.lambda_) for job in plan.jobs()}
    assert settings == {
        "baseline": (0.0, 0.0), "cls": (1.2, 0.0), "loc": (0.0, 1.0), "both": (1.2, 1.0), "control": (0.0, 0.0),
    }  # fmt: skip
    assert {job.config.optim.lr for job in plan.jobs()} == {0.5}


def test_eq_7_for_all_takes_no_published_factor():
    options = {"loss.normalize_loc": True}
    plan = make_plan("table2", "paper", data=None, seeds=1, options=options)
    found = {job.arm: job.config.loss.w_loc for job in plan.jobs()}
    assert (found["loc"], found["both"], found["control"]) == (1.0, 1.0, 2.0)


def test_arms_are_the_papers_losses():
    losses = {job.arm: job.config.loss for job in make_plan("table2", seeds=1).jobs()}
    settings = {name: (loss.eta, loss.lambda_, loss.w_loc) for name, loss in losses.items()}
    assert settings == {
        "baseline": (0.0, 0.0, 1.0),
        "cls": (1.5, 0.0, 1.0),
        "loc": (0.0, 1.5, "auto"),
        "both": (1.5, 1.5, "auto"),
        "control": (0.0, 0.0, 2.0),
    }
    exponents = {job.arm: job.config.loss for job in make_plan("table3", seeds=1).jobs()}
    assert [exponents[f"eta-{v}"].eta for v in ("1", "1.4", "1.5", "1.6")] == [1.0, 1.4, 1.5, 1.6]
    for v in ("0.5", "1", "1.5", "1.8"):
        loss = exponents[f"lambda-{v}"]
        assert (loss.eta, loss.lambda_, loss.w_loc, loss.normalize_loc) == (0.0, float(v), "auto", False)
    assert exponents["eq7"].normalize_loc and exponents["eq7"].w_loc == 1.0
    # The paper's preset measures w_loc for each lambda as well.
    full = {job.arm: job.config.loss for job in make_plan("table3", "paper").jobs()}
    assert {full[f"lambda-{v}"].w_loc for v in ("0.5", "1", "1.5", "1.8")} == {"auto"}
    seven = {job.arm: job.config.loss for job in make_plan("table7", "paper").jobs()}
    assert (seven["both"].eta, seven["both"].lambda_, seven["both"].w_loc) == (1.3, 1.5, 2.4)


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
@pytest.mark.parametrize("table", TABLES)
def test_arms_of_a_seed_differ_in_the_loss_alone(table, preset):
    groups: dict[tuple, list] = {}
    for job in make_plan(table, preset).jobs():
        groups.setdefault((job.block, job.row, job.seed), []).append(job.config)
        assert job.config.train.seed == job.seed
    for first, *others in groups.values():
        for other in others:
            changes = config_diff(first.to_dict(), other.to_dict())
            assert changes and all(change.startswith("loss.") for change in changes)


def test_presets():
    cpu = make_plan("table2")
    assert len(cpu.jobs()) == 15
    assert [block.data for block in cpu.blocks] == [SyntheticSet(1500, 300, 128)]
    assert {job.config.model.name for job in make_plan("table1").jobs()} == {
        name for name, architecture in MODELS.items() if architecture.backbone == "tiny"
    }
    assert [(b.name, b.seeds) for b in make_plan("table2", "gpu").blocks] == [("synthetic", 8)]
    full = make_plan("table1", "paper")
    assert full.blocks[0].images == (118_287, 5_000)
    assert len(full.jobs()) == 6 * 3 + 2
    assert {len(make_plan(table, "paper").blocks) for table in TABLES} == {1}


def test_the_gpu_preset_has_photographs_and_rendered_images(tiny_data):
    plan = make_plan("table2", "gpu", data=tiny_data)
    assert [(block.name, block.seeds) for block in plan.blocks] == [("data", 20), ("synthetic", 8)]
    assert len(plan.jobs()) == 5 * 28
    assert plan.blocks[0].images == (16, 6)
    assert {job.config.data.image_size for job in plan.jobs() if job.block == "synthetic"} == {(256, 256)}
    # Every arm of a seed is finished before the next seed begins: what is there can be compared.
    seeds = [job.seed for job in plan.jobs() if job.block == "data"]
    assert seeds == sorted(seeds)


def test_choices():
    plan = make_plan("table1", "paper", rows=["ssd300", "retinanet_r50"], arms=["both"], options={"train.epochs": 1.0})
    assert {(job.row, job.arm) for job in plan.jobs()} == {
        (row, arm) for row in ("ssd300", "retinanet_r50") for arm in ("baseline", "both")
    }
    assert {job.config.train.epochs for job in plan.jobs()} == {1.0}


def test_backbone_files_are_found_by_name(tmp_path):
    for name in ("resnet50-0676ba61.pth", "vgg16_features-amdegroot-88682ab5.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"expected one file resnet101-\*.pth for RetinaNet R101, found none"):
        make_plan("table1", "paper", backbones=str(tmp_path))
    plan = make_plan("table7", "paper", backbones=str(tmp_path))
    assert {job.config.model.backbone_file for job in plan.jobs()} == {str(tmp_path / "resnet50-0676ba61.pth")}
    (tmp_path / "resnet50-11ad3fa6.pth").touch()
    with pytest.raises(UsageError, match="found resnet50-0676ba61.pth, resnet50-11ad3fa6.pth"):
        make_plan("table7", "paper", backbones=str(tmp_path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"table": "table8"}, "expected one of table1, .*, got 'table8'"),
        ({"table": "table2", "preset": "tpu"}, "--preset: expected one of cpu, gpu, paper, got 'tpu'"),
        ({"table": "table2", "seeds": 0}, "--seeds: expected at least 1, got 0"),
        ({"table": "table2", "rows": []}, "--rows: expected of retinanet_r50, got none"),
        ({"table": "table2", "rows": ["yolo"]}, "--rows: expected of retinanet_r50, got 'yolo'"),
        ({"table": "table2", "arms": []}, "--arms: expected of baseline, cls, loc, both, control, got none"),
        ({"table": "table2", "options": {"train.seed": 3}}, "--set: train.seed is the experiment's own: --seeds"),
        ({"table": "table2", "options": {"data.path": "x"}}, "--set: data.path is the experiment's own: --data"),
        ({"table": "table2", "options": {"loss.eta": 0}}, "--set: loss.eta=0 has no effect: the arms"),
        ({"table": "table3", "options": {"loss.eta": 1.2}}, "--set: loss.eta=1.2 has no effect: the arms"),
        (
            {"table": "table2", "options": {"optim.milestones": [0.5]}},
            "--set: optim.milestones has no effect with optim",
        ),
        ({"table": "table2", "arms": ["bth"]}, "--arms: expected of baseline, cls, loc, both, control, got 'bth'"),
        ({"table": "table2", "backbones": "."}, "--backbones: .*expected --preset paper, got 'cpu'"),
        ({"table": "table2", "preset": "paper", "backbones": "nowhere"}, "--backbones: nowhere is not a folder"),
        ({"table": "table2", "options": {"loss.etta": 1.0}}, "nearest is 'loss.eta'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_plan(**arguments).jobs()
