"""What autograd promises: repeated backward, grad_outputs, compile, autocast, refusals, in-place gradients."""

import contextlib
import copy
import gc
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import autograd, detection, flat, library
from ioubal_kernels.ops.autograd import take_buffers


def flat_case(name, dtype=torch.float32):
    """A loss as a function of its differentiable input, and that input."""
    inputs = testing.classification_inputs(seed=1, rows=50, classes=6, softmax=name == "softmax", dtype=dtype)
    pred, target = testing.delta_inputs(seed=1, rows=50, dtype=dtype)
    if name == "focal":
        return (lambda x, **k: ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou, **k)), inputs.logits
    if name == "bce":
        return (lambda x, **k: ik.iou_balanced_binary_cross_entropy(x, inputs.labels, inputs.iou, **k)), inputs.logits
    if name == "softmax":
        return (lambda x, **k: ik.iou_balanced_cross_entropy(x, inputs.labels, inputs.iou, **k)), inputs.logits
    return (lambda x, **k: ik.iou_balanced_smooth_l1_loss(x, target, **k)), pred


FLAT = ("focal", "softmax", "smooth_l1")
CALLED = {
    "focal": "iou_balanced_sigmoid_focal_loss",
    "bce": "iou_balanced_binary_cross_entropy",
    "softmax": "iou_balanced_cross_entropy",
    "smooth_l1": "iou_balanced_smooth_l1_loss",
}


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_second_backward_and_several_grad_outputs(layout):
    """A kept buffer that is rescaled in place would give 5 instead of 4 after grad_outputs 1, 2, 1."""
    inputs = testing.detection_inputs(layout=layout).requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments())
    total = out.classification + out.localization
    once = torch.autograd.grad(total, inputs.heads(), retain_graph=True)
    for factor in (1.0, 2.0, 1.0):
        (total * factor).backward(retain_graph=True)
    for head, grad in zip(inputs.heads(), once, strict=True):
        torch.testing.assert_close(head.grad, 4 * grad, rtol=1e-6, atol=0)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", FLAT)
def test_flat_second_backward(name, reduction):
    loss, x = flat_case(name)
    x = x.requires_grad_()
    value = loss(x, reduction=reduction)
    g = torch.linspace(0.5, 2, value.numel()).reshape(value.shape)
    once = torch.autograd.grad(value, x, g, retain_graph=True)[0]
    for factor in (1.0, 2.0, 1.0):
        value.backward(g * factor, retain_graph=True)
    torch.testing.assert_close(x.grad, 4 * once, rtol=1e-6, atol=0)
    expanded = loss(x, reduction=reduction)
    expanded.backward(torch.ones(()).expand(expanded.shape))  # stride 0


def test_the_gradient_buffer_is_handed_out_once():
    """Accumulating into .grad must not alias the context: the first gradient is kept by the caller, unchanged."""
    loss, x = flat_case("focal")
    x = x.requires_grad_()
    value = loss(x)
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(value, x, torch.tensor(5.0))[0]
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 5 * kept, rtol=1e-6, atol=0)


def test_each_loss_reaches_only_its_own_inputs():
    inputs = testing.detection_inputs(layout="nchw").requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments())
    out.classification.backward(retain_graph=True)
    assert all(t.grad is not None for t in inputs.cls_logits) and all(t.grad is None for t in inputs.bbox_deltas)
    out.localization.backward()
    assert all(t.grad is not None for t in inputs.bbox_deltas)
    assert not out.num_positives.requires_grad and not out.mean_iou.requires_grad


@pytest.mark.parametrize("factor", (3.7, 0.0, -1.0))
@pytest.mark.parametrize("grad_scale", (1.0, 3.7, 1024.0))
def test_grad_scale_changes_nothing_but_speed(grad_scale, factor):
    loss, x = flat_case("focal")
    want = torch.autograd.grad(loss(x.requires_grad_()) * factor, x)[0]
    got = torch.autograd.grad(loss(x, grad_scale=grad_scale) * factor, x)[0]
    torch.testing.assert_close(got, want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("scale", (1 / 3, 0.1, 3.049, 1e-7))
@pytest.mark.parametrize("as_tensor", (None, torch.float32, torch.float64))
def test_the_expected_grad_output_is_rounded_as_the_one_that_comes(monkeypatch, scale, as_tensor, inplace):
    """float32 has no 1/3: a float64 one would never be met, and every backward would go over the gradient again."""
    launched = []
    for module in (autograd, detection, flat):
        monkeypatch.setattr(module, "op", lambda name, backend: launched.append(name) or library.op(name, backend))
    given = scale if as_tensor is None else torch.tensor(scale, dtype=as_tensor)
    loss, x = flat_case("focal")
    leaf = x.clone().requires_grad_()
    (loss(leaf * 1, grad_scale=given, inplace=inplace) * scale).backward()
    want = x.clone().requires_grad_()
    loss(want, grad_scale=1.0).backward(torch.tensor(scale))
    torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-6, atol=0)
    inputs = testing.detection_inputs().requiring_grad()
    launched.clear()
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), grad_scale=given)
    ((out.classification + out.localization) * scale).backward()
    assert launched == ["detection_checked_fill"]


def test_only_what_requires_grad_gets_one():
    for want_logits, want_deltas in ((True, False), (False, True), (False, False)):
        inputs = testing.detection_inputs()
        inputs.cls_logits.requires_grad_(want_logits)
        inputs.bbox_deltas.requires_grad_(want_deltas)
        out = ik.iou_balanced_detection_loss(*inputs.arguments())
        total = out.classification + out.localization
        assert total.requires_grad == (want_logits or want_deltas)
        if total.requires_grad:
            total.backward()
        assert (inputs.cls_logits.grad is not None) == want_logits
        assert (inputs.bbox_deltas.grad is not None) == want_deltas


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_no_grad_allocates_no_gradient(mode):
    inputs = testing.detection_inputs(images=2, classes=80, per_location=9, levels=((20, 30),)).requiring_grad()
    want = ik.iou_balanced_detection_loss(*inputs.arguments())
    with mode():
        with torch.profiler.profile(profile_memory=True) as profile:
            got = ik.iou_balanced_detection_loss(*inputs.arguments())
    assert torch.equal(got.classification, want.classification.detach()) and not got.classification.requires_grad
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < inputs.cls_logits.nbytes / 100


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_what_is_saved_may_be_kept_elsewhere(layout):
    inputs = testing.detection_inputs(classes=5, positive_share=0.2, layout=layout)
    inputs = inputs._map_heads(lambda t: testing.placed(t, 1).requires_grad_())
    testing.check_saved_elsewhere(lambda: sum(ik.iou_balanced_detection_loss(*inputs.arguments())[:2]), inputs.heads())


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", CALLED)
def test_what_is_saved_of_rows_may_be_kept_elsewhere(name, reduction):
    loss, x = flat_case(name)
    x = testing.placed(x, 1).requires_grad_()
    testing.check_saved_elsewhere(lambda: loss(x, reduction=reduction), [x])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("wanted", ((True, False), (False, True), (False, False)))
def test_a_loss_without_inputs_to_train_has_no_gradient(wanted, backend):
    """A frozen or detached head shows: its loss cannot be differentiated."""
    inputs = testing.detection_inputs(layout="nchw")
    for heads, needed in zip((inputs.cls_logits, inputs.bbox_deltas), wanted, strict=True):
        for head in heads:
            head.requires_grad_(needed)
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=backend)
    assert (out.classification.requires_grad, out.localization.requires_grad) == wanted


def test_double_backward_is_refused():
    inputs = testing.detection_inputs(layout="nchw").requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments())
    grads = torch.autograd.grad(out.classification + out.localization, inputs.heads(), create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        sum(g.sum() for g in grads).backward()
    for name, called in CALLED.items():
        loss, x = flat_case(name)
        for reduction in ("mean", "none"):
            grad = torch.autograd.grad(loss(x.requires_grad_(), reduction=reduction).sum(), x, create_graph=True)[0]
            with pytest.raises(NotImplementedError, match=f"^{called}: double backward"):
                grad.sum().backward()


def test_forward_mode_is_refused():
    with forward_ad.dual_level():
        for name, called in CALLED.items():
            loss, x = flat_case(name)
            with pytest.raises(NotImplementedError, match=f"^{called}: forward-mode"):
                loss(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        inputs = testing.detection_inputs()
        inputs.cls_logits = forward_ad.make_dual(inputs.cls_logits, torch.ones_like(inputs.cls_logits))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ik.iou_balanced_detection_loss(*inputs.arguments())


def test_torch_func_transforms_are_refused():
    loss, x = flat_case("focal")
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(loss)(x)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.vmap(lambda v: loss(v))(x.expand(3, *x.shape))
    # Constants as well, whose values are not to be checked then.
    inputs = testing.classification_inputs(rows=50, classes=6, softmax=True)
    for function in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        for labels, iou in ((inputs.labels[None], inputs.iou[None]), (inputs.labels.expand(3, -1), inputs.iou)):
            stacked = (0, None) if iou.ndim == 1 else (0, 0)
            with pytest.raises(NotImplementedError, match="torch.func"):
                torch.vmap(lambda y, q, f=function: f(inputs.logits, y, q), in_dims=stacked)(labels, iou)
    got = torch.vmap(lambda y: ik.iou_balanced_cross_entropy(inputs.logits, y, inputs.iou, backend="reference"))(labels)
    want = ik.iou_balanced_cross_entropy(inputs.logits, inputs.labels, inputs.iou, backend="reference")
    torch.testing.assert_close(got, want.expand(3))


def test_an_exported_program_keeps_the_op():
    loss, x = flat_case("focal")

    class Head(torch.nn.Module):
        def forward(self, x):
            return loss(x)

    program = torch.export.export(Head(), (x,))
    assert any("focal_fill" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), loss(x))


def test_an_input_changed_after_the_forward_is_noticed():
    loss, x = flat_case("focal")
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    value = loss(inner)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


NO_INDUCTOR = pytest.mark.skipif(" " in torch.__file__, reason="inductor cannot link to a torch in a path with a space")


@pytest.mark.parametrize(
    "layout, backend",
    (
        ("flat", "aot_eager"),
        ("channels_last", "aot_eager"),
        pytest.param("nchw", "inductor", marks=NO_INDUCTOR),
    ),
)
def test_compiled_detection(layout, backend):
    inputs = testing.detection_inputs(layout=layout)

    def total(*arguments):
        out = ik.iou_balanced_detection_loss(*arguments)
        return out.classification + 2 * out.localization, out.num_positives, out.mean_iou

    eager = copy.deepcopy(inputs).requiring_grad()
    want = total(*eager.arguments())
    want[0].backward()
    torch._dynamo.reset()
    compiled = inputs.requiring_grad()
    got = torch.compile(total, fullgraph=True, backend=backend)(*compiled.arguments())
    got[0].backward()
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected)
    for a, b in zip(compiled.heads(), eager.heads(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "without", (torch.no_grad, torch.inference_mode, None), ids=("no_grad", "inference", "constants")
)
@pytest.mark.parametrize("levels", ("flat", "one map", "maps"))
def test_compiled_detection_without_gradients(levels, without):
    """One level is the case of as many arguments as the Function has parameters."""
    shape = {"levels": [(4, 5)]} if levels == "one map" else {}
    inputs = testing.detection_inputs(layout="flat" if levels == "flat" else "nchw", **shape)
    want = ik.iou_balanced_detection_loss(*inputs.arguments())
    torch._dynamo.reset()
    compiled = torch.compile(ik.iou_balanced_detection_loss, fullgraph=True, backend="eager")
    with without() if without else contextlib.nullcontext():
        got = compiled(*inputs.arguments())
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", FLAT)
def test_compiled_flat_with_changing_sizes(name, reduction):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss, x = flat_case(name)
    columns = x.shape[1]
    g = torch.Generator().manual_seed(0)

    def call(x, labels, iou, target):
        if name == "focal":
            return ik.iou_balanced_sigmoid_focal_loss(x, labels, iou, reduction=reduction).sum() * 2
        if name == "softmax":
            return ik.iou_balanced_cross_entropy(x, labels, iou, reduction=reduction).sum() * 2
        return ik.iou_balanced_smooth_l1_loss(x, target, reduction=reduction).sum() * 2

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 2, 33, 64):
        x = torch.randn(rows, columns, generator=g)
        rest = (torch.randint(-1, columns, (rows,), generator=g), torch.rand(rows, generator=g), x * 0.5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = call(a, *rest), compiled(b, *rest)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_autocast_leaves_the_loss_in_float32():
    inputs = testing.detection_inputs(layout="nchw").requiring_grad()
    conv = torch.nn.Conv2d(8, inputs.cls_logits[0].shape[1], 1)
    with torch.autocast("cpu", torch.bfloat16):
        inputs.cls_logits = [conv(torch.randn(2, 8, *size)) for size in inputs.levels]
        out = ik.iou_balanced_detection_loss(*inputs.arguments())
        assert inputs.cls_logits[0].dtype == torch.bfloat16 and out.classification.dtype == torch.float32
    (out.classification + out.localization).backward()
    assert conv.weight.grad.dtype == torch.float32 and bool(conv.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("factor", (1.0, 0.25))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_inplace_writes_the_gradient_over_the_logits(layout, factor):
    want = testing.detection_inputs(layout=layout).requiring_grad()
    out = ik.iou_balanced_detection_loss(*want.arguments())
    ((out.classification + out.localization) * factor).backward()

    got = testing.detection_inputs(layout=layout).requiring_grad()
    out = ik.iou_balanced_detection_loss(*got.arguments(), inplace=True)
    ((out.classification + out.localization) * factor).backward(retain_graph=True)
    for a, b in zip(got.heads(), want.heads(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    logits = got.cls_logits if layout == "flat" else got.cls_logits[0]
    assert logits.grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="one backward only"):
        out.classification.backward()


@pytest.mark.parametrize("share", (0.02, 0.9))  # around some entries, or by a mask of a block's
@pytest.mark.parametrize("classes", (1, 7))  # with one, positives are neighbours in memory
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_inplace_reads_the_positives_before_it_overwrites_them(layout, dtype, classes, share):
    """The pass that writes the gradient hands their logits on: losses and gradients are those of logits that stay."""
    make = partial(
        testing.detection_inputs, 3, 2, classes, levels=((40, 30), (20, 15)), positive_share=share, layout=layout
    )
    results = []
    for inplace in (False, True):
        inputs = make(dtype=dtype).requiring_grad()
        out = ik.iou_balanced_detection_loss(*inputs.arguments(), inplace=inplace)
        (out.classification + out.localization).backward()
        results.append([out.classification, out.num_positives, *(x.grad for x in inputs.heads())])
    assert out.num_positives > (20 if share < 0.5 else 2000)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ("focal", "bce"))
def test_inplace_refuses_what_it_cannot_serve(name):
    loss, x = flat_case(name)
    logits = x.clone().requires_grad_()
    inner = logits * 1
    grad = torch.autograd.grad(loss(inner, inplace=True), inner, create_graph=False)[0]
    assert bool(grad.isfinite().all())
    with pytest.raises(NotImplementedError, match=f"^{CALLED[name]}: double backward"):
        torch.autograd.grad(loss(logits * 1, inplace=True), logits, create_graph=True)
    inputs = testing.detection_inputs(layout="nchw").requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), inplace=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(out.classification, inputs.cls_logits, create_graph=True)
    twice = testing.detection_inputs(levels=((2, 3), (2, 3)), layout="nchw").requiring_grad()
    twice.cls_logits = [twice.cls_logits[0] * 1] * 2
    with pytest.raises(ValueError, match="iou_balanced_detection_loss: .* share no memory"):
        ik.iou_balanced_detection_loss(*twice.arguments(), inplace=True)
    for bad in (0.0, 1e-45, torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match=f"^{CALLED[name]}: .*grad_scale that is finite and != 0"):
            loss(logits * 1, inplace=True, grad_scale=bad)
    with pytest.raises(ValueError, match=f"^{CALLED[name]}: .*reduction"):
        loss(logits * 1, inplace=True, reduction="none")
    with pytest.raises(ValueError, match="contiguous"):
        loss((logits * 1).t().contiguous().t(), inplace=True)


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_inplace_leaves_ignored_rows_at_zero(kernels, dtype, value):
    """Whatever grad_output is, an ignored row's gradient is 0; off the multiples of 16 bytes, too."""
    inputs = testing.classification_inputs(rows=70, classes=5, ignored_share=0.3, dtype=dtype)
    for offset in (0, 1):
        leaf = inputs.logits.clone().requires_grad_()
        given = torch.cat([torch.zeros(offset), (leaf * 1).flatten()]).to(dtype)[offset:].view_as(leaf)
        loss = ik.iou_balanced_sigmoid_focal_loss(given, inputs.labels, inputs.iou, inplace=True)
        loss.backward(torch.tensor(value))
        ignored = inputs.labels == ik.IGNORE
        assert bool((leaf.grad[ignored] == 0).all()) and not bool(leaf.grad[~ignored].isfinite().any())


def test_inplace_with_a_grad_scale_tensor_that_changes_later():
    loss, x = flat_case("focal")
    leaf = x.detach().clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf) * 3, leaf)[0]
    scale = torch.tensor(2.0)
    value = loss(leaf * 1, inplace=True, grad_scale=scale)
    scale.fill_(8.0)
    got = torch.autograd.grad(value * 3, leaf)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_inplace_is_noticed_by_others_that_saved_the_logits():
    loss, x = flat_case("focal")
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    other = logits.sigmoid().sum() + (logits * logits).sum()  # saves the logits
    value = loss(logits, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (value + other).backward()


def test_inplace_notices_that_its_gradient_was_overwritten():
    loss, x = flat_case("focal")
    logits = x.clone().requires_grad_() * 1
    value = loss(logits, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    logits = x.clone().requires_grad_() * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss(logits, inplace=True) + loss(logits, inplace=True)).backward()


def test_a_gradient_buffer_is_handed_out_once():
    """Whatever other thread's backward of the graph comes in between."""

    class Context:
        inside = False

        def __getattribute__(self, name):
            if name != "inside" and not self.inside:
                self.inside = True
                taken.append(take_buffers(self, [x]))
                self.inside = False
            return object.__getattribute__(self, name)

    for _ in range(3):
        x, taken, context = torch.zeros(3), [], Context()
        context.buffers = [torch.ones(3)]
        taken.append(take_buffers(context, [x]))
        assert sum(filled for _, filled in taken) == 1
        assert len({buffers[0].data_ptr() for buffers, _ in taken}) == len(taken)


def test_the_context_releases_its_memory():
    loss, x = flat_case("focal")
    x = x.requires_grad_()
    loss(x).backward()
    x.grad = None
    gc.collect()
    before = sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))
    for _ in range(20):
        loss(x).backward()
        x.grad = None
    gc.collect()
    assert sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor)) <= before + 1


def test_decode_is_differentiable_like_the_formula():
    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(40, 4, generator=g) * 3  # some dw, dh beyond the clamp
    anchors = torch.tensor([10.0, 20, 50, 90]) + torch.rand(40, 4, generator=g)
    for coder_weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        a, b = deltas.clone().requires_grad_(), deltas.double().requires_grad_()
        g_out = torch.randn(40, 4, generator=g)
        with ik.use_backend("cpu"):
            fast = ik.decode_boxes(a, anchors, weights=coder_weights)
        with ik.use_backend("reference"):
            oracle = ik.decode_boxes(b, anchors.double(), weights=coder_weights)
        fast.backward(g_out)
        oracle.backward(g_out.double())
        torch.testing.assert_close(fast.double(), oracle, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-6, atol=1e-6)
