"""Posters with their design briefs, and briefs that lose some of their fields while training.

B batch, R resolution. Columns are those of data_scripts/make_posters.py.
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
"""Of brief tensors, in the order of their tokens."""


class BriefedPosters(ImageDataset):
    """Rows of a poster dataset as `{"pixel_values", "brief", "index"}`, with `control` also a control image.

    `pixel_values` is float32 3 R R in [-1, 1]; `brief` what `brief_tensors` makes of the row's V_Meta, without its
    first dimension. Numbers of the grammar that the dataset lacks are absent. The control is that of `ImageDataset`.

    Raises:
        UserError: no poster dataset, at once; `BadRow` when a row is read that cannot be used.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, control: Any = None, augment: bool = True):
        name = str(config.dataset_name or config.train_data_dir)
        require_poster_columns(dataset, [config.image_column, *BRIEF_COLUMNS], name)
        super().__init__(dataset, config, captions=False, control=control, augment=augment)
        self.quick_columns = [name for name in FIELDS if name in dataset.column_names]
        self.dataset = self._undecoded(dataset, self.quick_columns)

    def brief(self, index: int) -> DesignBrief:
        """The brief of a row. Raises BadSample."""
        return brief_of(self.dataset.select_columns(self.quick_columns)[index])

    def quick_problems(self, row: dict[str, Any]) -> list[BadSample]:
        """A brief that cannot be."""
        try:
            brief_of(row)
        except BadSample as problem:
            return [problem]
        return []

    def item(self, row: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """The sample made from a stored row.

        Raises:
            BadSample: the row cannot be used.
        """
        brief = {name: tensor[0] for name, tensor in brief_tensors([brief_of(row)]).items()}
        return {**super().item(row, key), "brief": brief}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: pixel_values B 3 R R, index int64 B, brief as of `brief_tensors`."""
        batch = super().collate([{name: value for name, value in item.items() if name != "brief"} for item in items])
        return {**batch, "brief": collate_items([item["brief"] for item in items])}


def brief_of(row: dict[str, Any]) -> DesignBrief:
    """The V_Meta of a dataset's row.

    Raises:
        BadSample: a value that cannot be.
    """
    try:
        return DesignBrief.from_row(row)
    except ValueError as error:
        # Its messages begin with the field, which is the column.
        raise BadSample(str(error).split()[0].rstrip(":"), str(error)) from error


def drop_fields(brief: dict[str, Tensor], draws: Draws, field_dropout: float, cfg_dropout: float) -> dict[str, Tensor]:
    """Brief tensors with fields made absent, sample by sample.

    Each sample has a share of its own, u^(1/p - 1) with u uniform in [0, 1): `field_dropout` = p on average, near 0
    for most and near 1 for some, so that the model meets whole briefs and briefs of two or three words alike. A palette
    is lost from its end: what is left of it are its first colours.

    Args:
        brief: as of `brief_tensors`; it is not changed.
        field_dropout: in [0, 1].
        cfg_dropout: share of samples that lose the whole brief, for classifier-free guidance.
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
