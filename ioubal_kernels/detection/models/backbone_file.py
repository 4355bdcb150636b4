"""Pretrained backbones from files named by the user: checked, never downloaded, never unpickled as objects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError

# torchvision and MMDetection end a weight file's name in the first digits of its SHA-256: resnet50-0676ba61.pth.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth")


def read_backbone_file(path: str, sha256: str | None) -> dict[str, Tensor]:
    """The state dict in a .pth file.

    Args:
        path: the file.
        sha256: its expected digest, or None: then the first digits are taken from the file's name where it has them.

    Raises:
        UsageError: no such file, another digest, or not a plain dict of tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"model.backbone_file: {file} is not a file")
    in_name = _DIGEST_IN_NAME.search(file.name)
    expected = (sha256 or (in_name[1] if in_name else "")).lower()
    if expected:
        with open(file, "rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        if not digest.hexdigest().startswith(expected):
            source = "" if sha256 else ", as its name says"
            raise UsageError(
                f"model.backbone_file: SHA-256 of {file} is {digest.hexdigest()}, expected {expected}{source}"
            )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no state dict
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model.backbone_file: {file} is not a plain PyTorch state dict: {first_line}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError(f"model.backbone_file: {file} holds {type(state).__name__}, expected a dict of tensors")
    return state


def load_backbone_file(
    body: nn.Module, path: str, sha256: str | None, key_of: Callable[[str], str | None] = lambda key: key
) -> None:
    """Load a backbone file into `body`; what else the file holds (a classifier) is left out.

    Args:
        body: the part of the network that the file has weights of.
        path, sha256: as in `read_backbone_file`.
        key_of: the file's name of one of body's keys; None for a key that no backbone file has.

    Raises:
        UsageError: as `read_backbone_file`; missing keys and other shapes are listed.
    """
    state = read_backbone_file(path, sha256)
    names = {own: key_of(own) for own in body.state_dict()}
    own = {key: value for key, value in body.state_dict().items() if names[key] is not None}
    missing = sorted(key for key in own if names[key] not in state)
    wrong = sorted(k for k, v in own.items() if names[k] in state and state[names[k]].shape != v.shape)
    if missing or wrong:
        raise UsageError(
            f"model.backbone_file: {path} does not fit this backbone: missing {missing[:5]}, other shapes {wrong[:5]} "
            f"({len(missing)} missing, {len(wrong)} of another shape)"
        )
    body.load_state_dict({k: state[names[k]] for k in own}, strict=False)
