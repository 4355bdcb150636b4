"""The catalogue's entries on unchecked values, autograd, memory layout, threads and repeats, on every backend.

The number of the catalogue's entry is in the test's name; the rest of it is in test_edge.
"""

import threading

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import ioubal_kernels as ik
from ioubal_kernels import testing


def sigmoid(c: testing.ClassificationInputs, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return testing.loss_and_gradient(ik.iou_balanced_sigmoid_focal_loss, c, backend=backend, **options)


def softmax(c: testing.ClassificationInputs, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return testing.loss_and_gradient(ik.iou_balanced_cross_entropy, c, backend=backend, **options)


def detection(d: testing.DetectionInputs, backend: str, **options) -> tuple[ik.DetectionLoss, list[torch.Tensor]]:
    return testing.loss_and_gradient(ik.iou_balanced_detection_loss, d, backend=backend, **options)


def exactly_zero(t: torch.Tensor) -> bool:
    """+0 everywhere, not -0 or NaN."""
    return bool((t == 0).all()) and not bool(t.signbit().any())


class TestUnchecked:
    @pytest.mark.parametrize("label", [5, 99, -3, 2**31 - 1, -(2**31)])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_a14_labels(self, label: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IOUBAL_CHECK", "0")
        for softmax_labels, function in ((False, sigmoid), (True, softmax)):
            if softmax_labels and label < 0:
                continue
            c = testing.classification_inputs(0, index_dtype=dtype, softmax=softmax_labels)
            c.labels[9] = label
            loss, grad = function(c, backend)
            assert loss.isnan()
            assert grad[torch.arange(64) != 9].isfinite().all()
            c.labels[9] = 0
            assert function(c, backend)[0].isfinite()

    @pytest.mark.parametrize("index", [-3, 5, 2**31 - 1, -(2**31)])
    @pytest.mark.parametrize("gt", ["list", "padded"])
    def test_a16_a17_matched_idxs(self, index: int, gt: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IOUBAL_CHECK", "0")
        d = testing.detection_inputs(0, gt=gt)
        d.matched_idxs[1, 9] = index
        loss, _ = detection(d, backend)
        assert loss.classification.isnan()
        assert loss.localization.isnan()

    def test_a16_gt_labels_and_scope_ids(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IOUBAL_CHECK", "0")
        d = testing.detection_inputs(0)
        n, r = (d.matched_idxs >= 0).nonzero()[0].tolist()
        d.gt_labels[n][d.matched_idxs[n, r]] = 77
        assert detection(d, backend)[0].classification.isnan()
        c = testing.classification_inputs(0)
        c.scope_ids[int((c.labels >= 0).nonzero()[0])] = 10**6
        assert sigmoid(c, backend, scope_ids=c.scope_ids, num_scopes=3)[0].isnan()


class TestAutograd:
    @pytest.mark.parametrize(("cls", "loc"), [(True, False), (False, True), (False, False)])
    def test_a41_a46_which_inputs_and_outputs(self, cls: bool, loc: bool, backend: str) -> None:
        d = testing.detection_inputs(0)
        logits, deltas = d.cls_logits.clone().requires_grad_(cls), d.bbox_deltas.clone().requires_grad_(loc)
        loss = ik.iou_balanced_detection_loss(logits, deltas, *d.arguments()[2:], backend=backend)
        assert loss.classification.requires_grad or not cls
        assert loss.localization.requires_grad or not loc
        assert not loss.num_positives.requires_grad
        assert not loss.mean_iou.requires_grad
        _, (want_cls, want_loc) = detection(d, backend)
        if cls:
            loss.classification.backward()
            torch.testing.assert_close(logits.grad, want_cls)
        if loc:
            loss.localization.backward()
            torch.testing.assert_close(deltas.grad, want_loc)
        both = d.requiring_grad()
        out = ik.iou_balanced_detection_loss(*both.arguments(), backend=backend)
        grads = torch.autograd.grad(out.localization, both.heads(), allow_unused=True)
        assert grads[0] is None or exactly_zero(grads[0])
        torch.testing.assert_close(grads[1], want_loc)

    @pytest.mark.parametrize("grad_output", [3.7, 0.0, -1.0, 65536.0])
    @pytest.mark.parametrize("grad_scale", [1.0, 65536.0])
    def test_a42_grad_output(self, grad_output: float, grad_scale: float, backend: str) -> None:
        d = testing.detection_inputs(0)
        _, (want_cls, want_loc) = detection(d, backend)
        e = d.requiring_grad()
        loss = ik.iou_balanced_detection_loss(*e.arguments(), grad_scale=grad_scale, backend=backend)
        torch.autograd.backward([loss.classification * grad_output, loss.localization * (2 * grad_output)])
        torch.testing.assert_close(e.cls_logits.grad, want_cls * grad_output)
        torch.testing.assert_close(e.bbox_deltas.grad, want_loc * (2 * grad_output))

    @pytest.mark.parametrize("kind", ["expanded", "strided", "random"])
    def test_a43_grad_output_of_reduction_none(self, kind: str, backend: str) -> None:
        c = testing.classification_inputs(0)
        g = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
        g = {"expanded": torch.tensor(2.0).expand(64, 5), "strided": g.t(), "random": g.t().contiguous()}[kind]
        grads = []
        for name in (backend, "reference"):
            x = c.logits.clone().requires_grad_()
            loss = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, reduction="none", backend=name)
            loss.backward(g)
            grads.append(x.grad)
        torch.testing.assert_close(*grads)

    def test_a44_second_backward(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        _, want = sigmoid(c, backend)
        x = c.logits.clone().requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)
        grads = [torch.autograd.grad(loss, x, torch.tensor(g), retain_graph=True)[0] for g in (1.0, 2.0, 1.0)]
        for grad, factor in zip(grads, (1, 2, 1), strict=True):
            torch.testing.assert_close(grad, want * factor)
        torch.autograd.grad(loss, x)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)

    def test_a45_double_backward(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        x = c.logits.clone().requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0
            return
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.autograd.grad(grad.sum(), x)

    def test_a47_inputs_changed_after_the_forward(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        x = c.logits.clone().requires_grad_()
        y = x * 1.0
        loss = ik.iou_balanced_sigmoid_focal_loss(y, c.labels, c.iou, backend=backend)
        (want,) = torch.autograd.grad(loss, x, retain_graph=True)
        with torch.no_grad():
            y.zero_()
        # Either the change is refused, or the backward never reads the logits again and is right.
        try:
            (got,) = torch.autograd.grad(loss, x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(got, want)

    def test_a48_without_gradients(self, backend: str) -> None:
        d = testing.detection_inputs(0).requiring_grad()
        want = [t.item() for t in ik.iou_balanced_detection_loss(*d.arguments(), backend=backend)]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = ik.iou_balanced_detection_loss(*d.arguments(), backend=backend)
            assert not any(t.requires_grad for t in loss)
            assert [t.item() for t in loss] == want

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a49_autocast(self, dtype: torch.dtype, backend: str) -> None:
        d = testing.detection_inputs(0, dtype=dtype)
        want, want_grads = detection(d, backend)
        with torch.autocast("cpu", dtype):
            got, grads = detection(d, backend)
        assert got.classification.dtype == torch.float32
        assert [t.item() for t in got] == [t.item() for t in want]
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))

    def test_a53_func_grad(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        _, want = sigmoid(c, backend)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)

        try:
            got = torch.func.grad(loss)(c.logits)
        except (NotImplementedError, RuntimeError) as error:
            assert backend != "reference"
            assert str(error)
        else:
            torch.testing.assert_close(got, want)

    def test_a54_forward_mode(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        with fwAD.dual_level():
            x = fwAD.make_dual(c.logits, torch.ones_like(c.logits))
            if backend != "reference":
                with pytest.raises(NotImplementedError):
                    ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)
                return
            loss = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)
            tangent = fwAD.unpack_dual(loss).tangent
        torch.testing.assert_close(tangent, sigmoid(c, backend)[1].sum())


class TestMemory:
    @pytest.mark.parametrize("classes", [1, 4, 5, 7])
    def test_a18_a19_a20_layouts(self, classes: int, backend: str) -> None:
        c = testing.classification_inputs(0, 33, classes)
        want_loss, want = sigmoid(c, backend)
        for name, view in testing.same_values_other_memory(c.logits):
            x = view.detach().requires_grad_()
            loss = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, backend=backend)
            (grad,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0, msg=name)
            torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-12, msg=name)
        row = torch.randn(1, classes, requires_grad=True)
        loss = ik.iou_balanced_sigmoid_focal_loss(row.expand(33, classes), c.labels, c.iou, backend=backend)
        loss.backward()
        assert row.grad.shape == (1, classes)
        labels, iou = c.labels.repeat_interleave(2)[::2], c.iou.repeat_interleave(3)[::3]
        assert ik.iou_balanced_sigmoid_focal_loss(c.logits, labels, iou, backend=backend) == want_loss

    @pytest.mark.parametrize("rows", testing.AWKWARD_ROWS)
    def test_a22_row_counts(self, rows: int, backend: str) -> None:
        self.compare_sizes(rows, 5, backend)

    @pytest.mark.parametrize("classes", testing.AWKWARD_CLASSES)
    def test_a21_class_counts(self, classes: int, backend: str) -> None:
        self.compare_sizes(19, classes, backend)

    @staticmethod
    def compare_sizes(rows: int, classes: int, backend: str) -> None:
        for function, kind in ((sigmoid, False), (softmax, True)):
            c = testing.classification_inputs(1, rows, classes, softmax=kind)
            loss, grad = function(c, backend)
            c.logits, c.iou = c.logits.double(), c.iou.double()
            want_loss, want = function(c, "reference")
            torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-7)

    def test_a55_threads(self, backend: str) -> None:
        d = testing.detection_inputs(0)
        want, want_grads = detection(d, backend)
        failures: list[str] = []

        def work() -> None:
            for _ in range(5):
                got, grads = detection(d, backend)
                same = all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
                if not same or [t.item() for t in got] != [t.item() for t in want]:
                    failures.append("differs")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_a58_a59_repeats_are_bitwise_equal(self, backend: str) -> None:
        c = testing.classification_inputs(0, 500, 20)
        want_loss, want = sigmoid(c, backend)
        for _ in range(20):
            loss, grad = sigmoid(c, backend)
            assert loss == want_loss
            assert torch.equal(grad, want)

    def test_a67_meta_tensors(self) -> None:
        d = testing.detection_inputs(0)
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else [u.to("meta") for u in t] for t in d.arguments()]
        loss = ik.iou_balanced_detection_loss(*meta)
        assert [t.shape for t in loss] == [torch.Size([])] * 4
        assert [t.device.type for t in loss] == ["meta"] * 4

    def test_inputs_are_never_written(self, backend: str) -> None:
        d = testing.detection_inputs(0, gt="padded")
        before = [t.clone() for t in d.arguments()]
        detection(d, backend)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, d.arguments(), strict=True))
