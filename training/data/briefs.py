"""Dataset of posters with their design briefs, and random removal of brief fields during training.

B batch, R resolution. The columns are those that data_scripts/make_posters.py writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.common.design_brief import FIELDS, DesignBrief, brief_tensors
from pipelines.common.poster_domain import GRAMMAR
from training.core.draws import Draws, SampleKey
from training.data.images import BadSample, ImageDataset, collate_items
from training.data.posters import require_poster_columns
from training.data.source import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset

BRIEF_COLUMNS = tuple(name for name in FIELDS if name not in GRAMMAR)
PARTS = ("style", "numbers", "counts", "palette")
"""Parts of the brief tensors, in the order of their tokens."""


class BriefedPosters(ImageDataset):
    """Rows of a poster dataset as `{"pixel_values", "brief", "index"}`; with `control`, also a control image.

    `pixel_values` is float32 3 R R in [-1, 1]. `brief` is the result of `brief_tensors` for the row's V_Meta, without
    the batch dimension. Grammar numbers that the dataset lacks are marked as absent. Control images are handled as in
    `ImageDataset`.

    Raises:
        UserError: at construction, if the dataset is not a poster dataset; `BadRow` when an unusable row is read.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, control: Any = None, augment: bool = True):
        name = str(config.dataset_name or config.train_data_dir)
        require_poster_columns(dataset, [config.image_column, *BRIEF_COLUMNS], name)
        super().__init__(dataset, config, captions=False, control=control, augment=augment)
        self.quick_columns = [name for name in FIELDS if name in dataset.column_names]
        self.dataset = self._undecoded(dataset, self.quick_columns)
        self.number_columns = self.quick_columns

    def brief(self, index: int) -> DesignBrief:
        """Return the brief of a row. Raises BadSample if it is invalid."""
        return brief_of(self.dataset.select_columns(self.quick_columns)[index])

    def quick_problems(self, row: dict[str, Any]) -> list[BadSample]:
        """Return what is wrong with the row's brief: one problem or none."""
        try:
            brief_of(row)
        except BadSample as problem:
            return [problem]
        return []

    def item(self, row: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """Return the training sample of a stored row.

        Raises:
            BadSample: the row cannot be used.
        """
        brief = {name: tensor[0] for name, tensor in brief_tensors([brief_of(row)]).items()}
        return {**super().item(row, key), "brief": brief}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch: pixel_values B 3 R R, index int64 B, and brief with the tensors of `brief_tensors`."""
        batch = super().collate([{name: value for name, value in item.items() if name != "brief"} for item in items])
        return {**batch, "brief": collate_items([item["brief"] for item in items])}


def brief_of(row: dict[str, Any]) -> DesignBrief:
    """Return the design brief (V_Meta) of a dataset row.

    Raises:
        BadSample: a value is invalid.
    """
    try:
        return DesignBrief.from_row(row)
    except ValueError as error:
        # The message of DesignBrief begins with the name of the field, which is also the name of the column.
        raise BadSample(str(error).split()[0].rstrip(":"), str(error)) from error


def drop_fields(brief: dict[str, Tensor], draws: Draws, field_dropout: float, cfg_dropout: float) -> dict[str, Tensor]:
    """Mark random fields of brief tensors as absent, independently for each sample.

    Each sample has its own probability of dropping a field, u^(1/p - 1) with u uniform in [0, 1) and p =
    `field_dropout`. Its mean is p, but it is near 0 for most samples and near 1 for some, so that the model sees
    complete briefs as well as briefs of two or three fields. A palette loses its last colours first.

    Args:
        brief: from `brief_tensors`; not modified.
        field_dropout: mean probability that a field is dropped, in [0, 1].
        cfg_dropout: fraction of samples whose whole brief is dropped, for classifier-free guidance.
    """
    share = torch.zeros_like(draws.uniform("field_dropout"))
    if field_dropout:
        share = draws.uniform("field_dropout") ** (1 / field_dropout - 1)
    share = torch.where(draws.uniform("cfg_dropout") < cfg_dropout, torch.ones_like(share), share)
    widths = [brief[f"{name}_present"].shape[1] for name in PARTS]
    kept = (draws.uniform("fields", (sum(widths),)) >= share[:, None]).split(widths, dim=1)
    left = dict(zip(PARTS, kept, strict=True))
    left["palette"] = left["palette"].int().cumprod(1).bool()
    return {**brief, **{f"{name}_present": brief[f"{name}_present"] & left[name] for name in PARTS}}
