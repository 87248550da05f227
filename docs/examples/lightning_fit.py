"""Lightning with a callback, which rewrites what `training_step` calls while it is fitted."""

import tempfile

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fxckpt.integrations.lightning import FxckptCallback


class Classifier(lightning.LightningModule):
    """A stack of transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.model, self.losses = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The cross entropy."""
        x, labels = batch
        loss = cross_entropy(self.model(x).mean(1), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(callbacks: list[FxckptCallback], batches: DataLoader) -> list[float]:
    """The losses."""
    model = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision="bf16-mixed",
            callbacks=callbacks,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        torch.manual_seed(1)
        trainer.fit(model, batches)
    return model.losses


def main() -> tuple[list[float], list[float]]:
    """Losses without and with the callback."""
    data = TensorDataset(torch.randn(16, 8, 32), torch.randint(10, (16,)))
    batches = DataLoader(data, batch_size=4)
    without, with_ = fit([], batches), fit([FxckptCallback("block", module="model")], batches)
    print(f"losses without {without}\nlosses with    {with_}")
    return without, with_


if __name__ == "__main__":
    main()
