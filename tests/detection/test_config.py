"""The configuration: presets, strict reading, one clear message for everything that is wrong."""

from __future__ import annotations

import dataclasses

import pytest

from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.config import (
    Config,
    all_keys,
    config_diff,
    parse_assignment,
    parse_nan_policy,
)
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.presets import PRESETS, load_config, preset, recipe_of
from ioubal_kernels.detection.unused_keys import why_unused


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_its_own_yaml(name, tmp_path):
    config = preset(name)
    config.set("data.path", "some where/ünï")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(file)) == config


def test_preset_gives_a_fresh_object_each_time():
    preset("demo").set("optim.lr", 1.0)
    assert preset("demo").optim.lr == Config().optim.lr


@pytest.mark.parametrize(
    ("loss", "eta", "lambda_", "w_loc"),
    [("baseline", 0.0, 0.0, 1.0), ("cls", 1.5, 0.0, 1.0), ("loc", 0.0, 1.5, "auto"), ("both", 1.5, 1.5, "auto")],
)
def test_loss_switch(loss, eta, lambda_, w_loc):
    config = Config()
    config.set_loss(loss)
    assert (config.loss.eta, config.loss.lambda_, config.loss.w_loc, config.loss.label()) == (eta, lambda_, w_loc, loss)


@pytest.mark.parametrize(
    ("preset_name", "assignment", "because"),
    [
        ("table2_retinanet_r50", "train.iterations=3", r"train.iterations has no effect with train.epochs=12.0"),
        ("retinanet_tiny", "data.short_side=320", "data.short_side has no effect with data.image_size"),
        ("retinanet_tiny", "loss.rpn=true", "loss.rpn has no effect with model.name=retinanet_tiny"),
        ("faster_rcnn_tiny", "loss.rpn_w_loc=2", "loss.rpn_w_loc has no effect with loss.rpn=false"),
        ("retinanet_tiny", "optim.momentum=0.5", "optim.momentum has no effect with optim.name=adamw"),
        ("retinanet_tiny", "optim.milestones=[0.5]", "optim.milestones has no effect with optim.schedule=cosine"),
        ("ssd_tiny", "loss.alpha=0.5", "loss.alpha has no effect with model.name=ssd_tiny"),
        ("ssd_tiny", "loss.normalizer_scope=level", "loss.normalizer_scope: ssd_tiny's losses are not by level"),
    ],
)
def test_train_refuses_what_has_no_effect(ioubal, tmp_path, preset_name, assignment, because):
    code, _, err = ioubal(
        "train", "-c", preset_name, "--data", "nowhere", "--set", assignment, "-o", str(tmp_path / "r")
    )
    assert code == 2 and because in " ".join(err.split()), err
    assert not (tmp_path / "r").exists()


def test_every_key_that_can_be_unused_exists():
    keys = set(all_keys())
    for name in ("retinanet_tiny", "ssd_tiny", "faster_rcnn_tiny", "foveabox_tiny"):
        unused = {key for key in keys if why_unused(preset(name), key)}
        assert unused and unused < keys
        # Not what a recipe itself sets: each of its own keys has an effect.
        assert not unused & {"loss.beta", "loss.w_loc", "optim.lr", "data.image_size"}


def test_loss_switch_back_from_a_baseline():
    config = Config()
    config.set_loss("baseline")
    config.set_loss("both")
    assert config == Config()
    config.set("loss.w_loc", 3.0)
    config.set_loss("loc")
    assert config.loss.w_loc == 3.0


def test_loss_switch_keeps_chosen_exponents():
    config = Config()
    config.set("loss.eta", 0.7)
    config.set_loss("both")
    assert config.loss.eta == 0.7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", 1, r"unknown key 'optim.lrr'; the nearest is 'optim.lr'"),
        ("lr", 1, r"unknown key 'lr'; the nearest is 'optim.lr'"),
        ("loss.lambda", 1, r"the nearest is 'loss.lambda_'"),
        ("train.lr", 1, r"the nearest is 'optim.lr'"),
        ("loss.eta.x", 1, r"unknown key"),
        ("train.iterations", 0, r"train.iterations: expected an integer >= 1 and <= 1e\+08, got 0"),
        ("train.iterations", 1.5, r"train.iterations: expected an integer.*got 1.5 \(float\)"),
        ("train.iterations", True, r"train.iterations: expected an integer.*got True \(bool\)"),
        ("train.iterations", None, r"train.iterations: expected an integer.*got None"),
        ("optim.lr", -0.1, r"optim.lr: expected a number > 0 and <= 100, got -0.1"),
        ("optim.lr", 0, r"optim.lr: expected a number > 0"),
        ("optim.lr", float("nan"), r"optim.lr: expected a number.*got nan"),
        ("optim.lr", "fast", r"optim.lr: expected a number.*got 'fast' \(str\)"),
        ("optim.name", "adam", r"optim.name: expected one of adamw, sgd, got 'adam'"),
        ("data.image_size", [64], r"data.image_size: expected a list of 2, each an integer.*got \[64\]"),
        ("data.image_size", [64, "x"], r"data.image_size: expected a list of 2.*got 'x'"),
        ("data.image_size", 64, r"data.image_size: expected a list of 2.*got 64"),
        ("model.anchor_scale", "automatic", r"model.anchor_scale: expected a number.*or auto, got 'automatic'"),
        ("loss.w_loc", 0, r"loss.w_loc: expected a number > 0 or auto, got 0"),
        ("train.channels_last", "yes", r"train.channels_last: expected true or false, got 'yes'"),
        ("data.path", ["a"], r"data.path: expected text or null, got \['a'\]"),
    ],
)
def test_bad_value_names_key_expected_and_got(key, value, message):
    config = Config()
    with pytest.raises(UsageError, match=message):
        config.set(key, value)
    assert config == Config()


def test_what_yaml_takes_for_something_else():
    config = Config()
    config.set(*parse_assignment("train.amp=off"))
    assert config.train.amp == "off"
    config.set(*parse_assignment("optim.lr=3e-4"))
    config.set(*parse_assignment("optim.clip=1"))
    assert config.optim.lr == 3e-4
    assert config.optim.clip == 1.0
    assert isinstance(config.optim.clip, float)


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.lr=[1", "optim.lr=!!python/object:os.system x"])
def test_bad_assignment(text):
    with pytest.raises(UsageError, match="--set"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.milestones": [0.9, 0.6]}, r"optim.milestones: expected rising shares"),
        ({"train.nan_policy": "skip"}, r"train.nan_policy: expected stop or skip:N"),
        ({"model.norm": "frozen"}, "retinanet_tiny is always trained as a whole, got frozen"),
        ({"model.backbone_file": "x.pth"}, r"model.backbone_file: retinanet_tiny has no backbone"),
        ({"model.backbone_sha256": "00"}, r"model.backbone_sha256: given without"),
        (
            {"data.image_size": None, "data.short_side": 900, "data.long_side": 800},
            r"data.long_side: expected at least",
        ),
    ],
)
def test_conditions_between_keys(changes, message):
    config = Config()
    for key, value in changes.items():
        config.set(key, value)
    with pytest.raises(UsageError, match=message):
        config.validate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 0.1\n", r"c\.yaml: line \d+: not plain YAML"),
        ("optim: &a {lr: 0.1}\ntrain: *a\n", r"line 1: anchors and aliases are not accepted"),
        ("train: !!python/object/apply:os.getpid []\n", r"not plain YAML"),
        ("- 1\n- 2\n", r"expected a mapping of sections, got list"),
        ("optim: 3\n", r"optim: expected a mapping, got int"),
        ("optimizer: {lr: 1}\n", r"unknown key 'optimizer'"),
        ("optim: {lr: -1}\n", r"c\.yaml: optim\.lr: expected a number"),
        (
            "train: {iterations: 10, iteration: 3}\n",
            r"unknown key 'train.iteration'; the nearest is 'train.iterations'",
        ),
        ("[" * 3000, r"line 1: nested deeper than 20 levels"),
        ("optim: {lr: " + "1" * 1_000_001 + "}", r"bytes, expected at most 1000000"),
    ],
)
def test_bad_yaml_file(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(file))


def test_yaml_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="is not a file"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00optim")
    with pytest.raises(UsageError, match=r"b\.yaml"):
        load_config(str(tmp_path / "b.yaml"))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="unknown configuration 'retinanet_tyni'; the nearest is 'retinanet_tiny'"):
        load_config("retinanet_tyni")


def test_every_key_has_a_rule_and_a_line_of_help():
    config = Config()
    for key in all_keys():
        section, name = key.split(".")
        rules = {f.name: f.metadata for f in dataclasses.fields(getattr(config, section))}[name]
        assert rules["doc"]
        config.set(key, getattr(getattr(config, section), name))
    assert config == Config()


def test_diff_names_what_matters_only():
    new = Config()
    new.set("optim.lr", 0.5)
    new.set("data.workers", 7)
    assert config_diff(Config().to_dict(), new.to_dict()) == ["optim.lr: 0.003 -> 0.5"]


@pytest.mark.parametrize(("size", "found"), [(None, ["inference.batch_size: 16 -> 2"]), ([64, 96], [])])
def test_which_images_share_a_batch_matters_where_it_pads_them(size, found):
    old, new = Config(), Config()
    for config in (old, new):
        config.set("data.image_size", size)
    new.set("inference.batch_size", 2)
    assert config_diff(old.to_dict(), new.to_dict()) == found


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"loss.normalize_loc": True}, (1.0, 1.0)),
        ({"loss.w_loc": 2.0, "loss.normalize_loc": True}, (2.0, 1.0)),
        ({"loss.normalize_loc": True, "loss.rpn_w_loc": "auto"}, (1.0, "auto")),
        ({"loss.normalize_loc": False}, (3.049, 2.848)),
    ],
)
def test_eq_7_switched_on_takes_no_factor_that_was_meant_for_eq_6(changes, factors):
    config = preset("table1_retinanet_r50")
    config.set("loss.rpn_w_loc", 2.848)
    config.set_by_hand(changes.items())
    assert (config.loss.w_loc, config.loss.rpn_w_loc) == factors
    config.set_by_hand([("loss.w_loc", 3.0)])  # in a run that goes on
    config.set_by_hand([("loss.normalize_loc", config.loss.normalize_loc)])
    assert config.loss.w_loc == 3.0


def test_nan_policy():
    assert parse_nan_policy("stop") == 0
    assert parse_nan_policy("skip:3") == 3
    for bad in ("skip:0", "skip:-1", "skip:x", "ignore"):
        with pytest.raises(UsageError, match="expected stop or skip:N"):
            parse_nan_policy(bad)


# ---------------------------------------------------------------------------------------------- the paper's rows


def test_the_papers_rows_are_there_and_each_has_a_tiny_sibling():
    rows = [name for name in PRESETS if name.startswith("table") and not name.endswith("_tiny")]
    retinanets = {
        4: ("r18", "r50", "r101", "x101"),
        1: ("r50", "r101", "x101"),
        2: ("r50",),
        5: ("r50", "r101", "x101"),
    }
    expected = {f"table{t}_retinanet_{b}" for t, bodies in {**retinanets, 6: ("r50", "r101")}.items() for b in bodies}
    expected |= {f"table{table}_ssd{edge}" for table in (1, 5) for edge in (300, 512)}
    expected |= {"table1_foveabox_r50", "table1_faster_rcnn_r50", "table1_faster_rcnn_r101", "table7_faster_rcnn_r50"}
    assert set(rows) == expected
    for row in rows:
        full, small = preset(row), preset(f"{row}_tiny")
        assert MODELS[full.model.name].family == MODELS[small.model.name].family
        assert MODELS[small.model.name].backbone == "tiny"
        assert (full.loss.eta, full.loss.lambda_) == (small.loss.eta, small.loss.lambda_)
        small.require_start()
        with pytest.raises(UsageError, match="starts from ImageNet weights.*--init-from.*--from-scratch"):
            full.require_start()


def test_the_papers_schedules():
    """Rates, batches, epochs, steps and test settings, as the paper's toolbox has them."""
    retina = preset("table4_retinanet_r50")
    assert (retina.optim.lr, retina.optim.base_batch, retina.optim.weight_decay) == (0.01, 16, 1e-4)
    assert (retina.train.epochs, retina.optim.milestones, retina.optim.clip) == (12, (8 / 12, 11 / 12), 35.0)
    assert (retina.data.short_side, retina.data.long_side) == (800, 1333)
    assert (preset("table2_retinanet_r50").data.short_side, preset("table7_faster_rcnn_r50").data.long_side) == (
        600,
        1000,
    )
    assert (retina.loss.beta, retina.loss.w_loc, preset("table4_retinanet_r101").loss.w_loc) == (0.11, 3.049, 2.878)
    test = retina.inference
    assert (test.score_threshold, test.nms_threshold, test.candidates, test.max_detections) == (0.05, 0.5, 1000, 100)
    faster = preset("table7_faster_rcnn_r50")
    assert (faster.optim.lr, faster.loss.beta, faster.loss.eta, faster.loss.w_loc) == (0.02, 1.0, 1.3, 2.4)
    fovea = preset("table1_foveabox_r50").loss
    assert (fovea.alpha, fovea.gamma, fovea.beta, fovea.w_loc) == (0.4, 1.5, 0.11, "auto")
    for row, lr, epochs, milestones in (
        ("table1_ssd300", 2e-3, 120, (80 / 120, 110 / 120)), ("table5_ssd300", 1e-3, 240, (160 / 240, 200 / 240)),
    ):  # fmt: skip
        ssd = preset(row)
        assert (ssd.optim.lr, ssd.optim.base_batch, ssd.optim.weight_decay, ssd.optim.clip) == (lr, 64, 5e-4, 0.0)
        assert (ssd.train.epochs, ssd.optim.milestones, ssd.loss.normalizer_scope) == (epochs, milestones, "image")
        assert (ssd.inference.score_threshold, ssd.inference.nms_threshold) == (0.02, 0.45)
        assert (ssd.inference.max_detections, ssd.data.image_size) == (200, (300, 300))
    voc = preset("table5_retinanet_r50")
    assert (voc.optim.lr, voc.optim.base_batch, voc.loss.w_loc) == (0.0075, 12, 2.34)
    assert [preset(f"table{t}_ssd{e}").model.ssd_smallest for t, e in ((1, 300), (1, 512), (5, 300), (5, 512))] == [
        15, 10, 20, 15,
    ]  # fmt: skip
    city = preset("table6_retinanet_r50")
    assert (city.data.short_side_range, city.data.short_side, city.data.long_side) == ((800, 1024), 1024, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "ssd_tiny", "data.image_size": None}, "data.image_size: ssd_tiny needs a fixed size"),
        ({"model.name": "ssd300_vgg16", "model.ssd_smallest": 10}, "ssd300_vgg16 has 15 .COCO. and 20 .VOC., got 10"),
        ({"model.name": "ssd512_vgg16", "model.norm": "group"}, "model.norm: VGG16 has no normalisation"),
        ({"model.norm": "frozen"}, "retinanet_tiny is always trained as a whole, got frozen"),
        ({"model.backbone_file": "x.pth"}, "retinanet_tiny has no backbone that files exist for"),
        ({"model.name": "retinanet_r50_fpn", "model.backbone_sha256": "ab"}, "given without model.backbone_file"),
    ],
)
def test_models_that_do_not_go_together(changes, message):
    config = Config()
    with pytest.raises(UsageError, match=message):
        for key, value in changes.items():
            config.set(key, value)
        config.validate()


def test_whose_recipe_a_file_has(tmp_path):
    """A file that only names a model has the defaults' recipe; one that a run wrote has its own."""
    partial, whole = tmp_path / "partial.yaml", tmp_path / "whole.yaml"
    partial.write_text("model: {name: ssd_tiny}\n")
    whole.write_text(preset("ssd_tiny").to_yaml())
    found = [recipe_of(str(path), load_config(str(path))) for path in (partial, whole)]
    assert found == ["retinanet", "ssd"]
    assert recipe_of("ssd_tiny", preset("ssd_tiny")) == "ssd"
