"""The reader of posters: a layout encoder and an abstractor, both frozen, through which gradients pass to a poster.

Shapes: B posters, H W pixels, C feature channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError
from training.data.fingerprints import module_fingerprint

PARTS = ("encoder", "abstractor")


class PosterReader(nn.Module):
    """Predicts the features, the grammar and the counts of posters.

    Args:
        encoder: the layout encoder. abstractor: the grammar abstractor.
    """

    def __init__(self, encoder: Any, abstractor: Any):
        super().__init__()
        self.encoder, self.abstractor = encoder, abstractor
        self.requires_grad_(False).eval()

    def forward(self, posters: Tensor) -> tuple[Tensor, Any]:
        """Read posters, B 3 H W in [-1, 1]: the features (B C H W in [0, 1]) and the output of the abstractor."""
        features = self.encoder(posters).probabilities()
        return features, self.abstractor(features)

    def pipeline(self) -> Any:
        """Return the pipeline that reads images as training/evaluate.py does."""
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder, abstractor=self.abstractor)

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the weights of each part."""
        return {name: module_fingerprint(getattr(self, name)) for name in PARTS}


def load_reader(path: str, resolution: int, flag: str) -> PosterReader:
    """Load the reader at `path`: a run, a checkpoint, a pipeline folder or a Hub id.

    Args:
        resolution: side of the posters that it has to read.
        flag: the flag that `path` comes from, for error messages.

    Raises:
        UserError: the model does not exist, does not read posters, or was trained on posters of another side.
    """
    from pipelines.tools.loading import load_pipeline

    pipeline = load_pipeline(path)
    encoder, abstractor = (pipeline.components.get(name) for name in PARTS)
    if encoder is None or abstractor is None or len(GRAMMAR) != getattr(abstractor.config, "num_grammar", 0):
        raise UserError(
            f"{flag} {path} is a {type(pipeline).__name__} that cannot read the grammar of posters; give a run of "
            "train_abstractor.py with --encoder"
        )
    if encoder.config.sample_size != resolution:
        side = encoder.config.sample_size
        raise UserError(
            f"{flag} {path} was trained on posters of {side} px, but --resolution is {resolution}; give a reader that "
            f"was trained with --resolution {resolution}"
        )
    return PosterReader(encoder, abstractor)


def check_independent(judge: PosterReader, reader: PosterReader, path: str) -> None:
    """Check that the judge at `path` has no part in common with the reader whose gradient trains the decoder.

    Raises:
        UserError: it has the same weights.
    """
    own, other = judge.fingerprints(), reader.fingerprints()
    same = [name for name in PARTS if own[name] == other[name]]
    if same:
        raise UserError(
            f"--judge {path} has the same {' and the same '.join(same)} as --reader, so it would judge the decoder by "
            "the errors that the decoder was trained on; give a reader that was trained with another --seed and an "
            "encoder of its own"
        )
