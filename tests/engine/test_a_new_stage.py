"""A new stage that uses the public interface only: a masked autoencoder (He et al. 2022).

B batch, T patches, P values per patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

from tests.conftest import forget_accelerate
from tests.support.runs import assert_same_state, rows
from training.core.draws import Draws, SampleKey
from training.core.exchange import Exchange
from training.core.options import option
from training.core.previews import Previews
from training.core.stage import Batch, Phase, Stage, StageContext
from training.engine.run_config import RunConfig
from training.engine.session import train


@dataclass
class Config(RunConfig):
    masked_share: float = option(0.75, on_resume="warn", at_least=0, below=1)


class Stripes(torch.utils.data.Dataset):
    """Images of random stripes as patches, T P. Row i is a function of i alone."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> dict:
        colors = torch.rand(4, 1, generator=torch.Generator().manual_seed(key.index))
        return {"patches": colors.repeat_interleave(4, 0).expand(16, 12).contiguous()}


class MaskedAutoencoder(diffusers.ModelMixin, diffusers.ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 32):
        super().__init__()
        self.read, self.write = nn.Linear(12, width), nn.Linear(width, 12)
        self.mask_token, self.positions = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.randn(16, width))
        self.mix = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, patches: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """patches: B T P; masked: B T, bool → B T P."""
        tokens = torch.where(masked[:, :, None], self.mask_token, self.read(patches)) + self.positions
        return self.write(self.mix(tokens))


class MaskedPhase(Phase):
    name = "masked_autoencoder"

    def __init__(self, model: MaskedAutoencoder, masked_share: float):
        super().__init__()
        self.model, self.masked_share = model, masked_share

    def losses(self, batch: Batch, draws: Draws) -> torch.Tensor:
        masked = draws.uniform("mask", (16,)) < self.masked_share
        error = (self.model(batch["patches"], masked) - batch["patches"]).square().mean(2)
        return (error * masked).sum(1) / masked.sum(1).clamp(min=1)

    def forward(self, batch: Batch, draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.losses(batch, draws).mean(), {}


class MaskedAutoencoderStage(Stage):
    name, card_template = "masked autoencoder", "base.md.jinja"

    def __init__(self, config: Config, context: StageContext):
        super().__init__(context)
        torch.manual_seed(config.seed)
        self.model = MaskedAutoencoder()
        self.phases, self.ema_of = [MaskedPhase(self.model, config.masked_share)], {"unet": self.model}

    def train_data(self) -> Stripes:
        return Stripes(64)

    def validation_data(self) -> Stripes:
        return Stripes(10)

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        return {"loss": self.phases[0].losses(batch, draws).sum(), "count": torch.tensor(len(batch["patches"]))}

    def metrics(self, sums) -> dict[str, float]:
        return {"val_loss": sums["loss"] / sums["count"]}

    def previews(self, exchange: Exchange) -> Previews:
        drawn = self.model(torch.zeros(1, 16, 12), torch.ones(1, 16, dtype=torch.bool))[0, :, 0].clamp(0, 1).numpy()
        return Previews([Image.fromarray((drawn.reshape(4, 4) * 255).astype(np.uint8)).convert("RGB")], ["all masked"])

    def pipeline(self) -> diffusers.DiffusionPipeline:
        return diffusers.DDPMPipeline(self.model, diffusers.DDPMScheduler())


def test_it_trains_resumes_validates_previews_and_exports(tmp_path, capsys):
    def run(name: str, **settings) -> int:
        forget_accelerate()
        common = {"train_batch_size": 8, "num_train_epochs": 4, "learning_rate": 3e-3, "lr_warmup_steps": 0}
        return train(MaskedAutoencoderStage, Config(str(tmp_path / name), report_to="none", **common | settings))

    assert run("whole") == 0
    losses = [float(row["val_loss"]) for row in rows(tmp_path / "whole") if row.get("val_loss")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 1.5, "the model learns nothing"
    assert run("parted", num_train_epochs=2) == run("parted") == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parted")
    assert (tmp_path / "whole/samples/epoch_0004.png").is_file()
    exported = MaskedAutoencoder.from_pretrained(tmp_path / "whole/pipeline/unet")
    assert "masked-autoencoder" in (tmp_path / "whole/pipeline/README.md").read_text()
    assert not torch.equal(exported.positions, MaskedAutoencoder().positions)
    capsys.readouterr()
    assert run("whole", validate_only=True) == 0
    assert f"val_loss {losses[-1]:.6g}" in capsys.readouterr().out
