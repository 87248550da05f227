"""Trained by Lightning: bit for bit as without fxckpt."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import assert_same, encoder, vectors

import fxckpt
from fxckpt.integrations.lightning import FxckptCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    """Calls its inner model in a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = encoder(), []

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The cross entropy."""
        x, y = batch
        loss = cross_entropy(self.called(x).mean(1), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Logs the loss."""
        x, y = batch
        self.log("validation", cross_entropy(self.called(x).mean(1), y))

    def called(self, x: Tensor) -> Tensor:
        """What a step calls."""
        return self.model(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class WithForward(Classifier):
    """Calls itself in a training step."""

    def called(self, x: Tensor) -> Tensor:
        """Its own forward."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        """Calls the model."""
        return self.model(x)


def fitted(model: Any, folder: Path, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    """Trains; returns the checkpoint."""
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[*callbacks],
        **settings,
    )
    torch.manual_seed(1)
    trainer.fit(model, vectors(), vectors(8))
    return torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)


class Watched(lightning.Callback):
    """Notes that a module is rewritten and captured while it is fitted."""

    def __init__(self, path: str) -> None:
        self.path, self.captured = path, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Raises if nothing was captured."""
        fxckpt.graphs(pl_module.get_submodule(self.path))
        self.captured = True


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("how", ["inner module", "callback, inner module", "callback"])
def test_lightning(how: str, precision: str, tmp_path: Path) -> None:
    build = WithForward if how == "callback" else Classifier
    path = "" if how == "callback" else "model"
    eager, ours, watched = build(), build(), Watched(path)
    if how == "inner module":
        fxckpt.rewrite_(ours.model, "block", strict=True)
        callbacks = [watched]
    else:
        callbacks = [FxckptCallback("block", module=path, strict=True), watched]
    expected = fitted(eager, tmp_path, precision=precision)
    found = fitted(ours, tmp_path, *callbacks, precision=precision)
    assert watched.captured
    assert ours.losses == eager.losses
    assert_same(ours.parameters(), eager.parameters())
    assert found.keys() == expected.keys()
    assert found["callbacks"].keys() == expected["callbacks"].keys()
    assert list(found["state_dict"]) == list(expected["state_dict"])
    build().load_state_dict(found["state_dict"])


def test_callback_restores_the_module(tmp_path: Path) -> None:
    model = Classifier()
    fitted(model, tmp_path, FxckptCallback("block", module="model"))
    assert type(model.model) is nn.TransformerEncoder


def test_callback_restores_the_module_after_an_error(tmp_path: Path) -> None:
    class Fails(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("stop")

    model = Fails()
    with pytest.raises(KeyError, match="stop"):
        fitted(model, tmp_path, FxckptCallback("block", module="model"))
    assert type(model.model) is nn.TransformerEncoder


@pytest.mark.parametrize(
    ("model", "path", "problem"),
    [
        (Classifier, "", "Classifier defines no forward.*there are 'model'"),
        (Classifier, "modle", "Classifier has no such module; there are 'model'"),
    ],
)
def test_callback_refuses(model: Any, path: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(fxckpt.FxckptError, match=problem):
        fitted(model(), tmp_path, FxckptCallback("block", module=path))


def test_callback_tells_if_the_module_is_not_called(tmp_path: Path) -> None:
    class Calls(WithForward):
        def called(self, x: Tensor) -> Tensor:
            return self.model(x)

    with pytest.warns(fxckpt.FallbackWarning, match="does not call the forward of Calls"):
        fitted(Calls(), tmp_path, FxckptCallback("block"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "fxckpt.integrations.lightning")
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        import fxckpt.integrations.lightning  # noqa: F401
