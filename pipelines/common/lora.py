"""LoRA adapters for pipelines: load, weigh, fuse and unload them, with the methods and names of Diffusers.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_PAIR = re.compile(r"(?P<component>\w+)\.(?P<layer>.+)\.(?:lora_A|lora_B)\.weight")


class LoRAMixin(LoraBaseMixin):
    """Adds `load_lora_weights`, `set_adapters`, `fuse_lora`, `unfuse_lora`, `unload_lora_weights` and the like.

    Name it before the other base classes. PEFT has to be installed to load an adapter (`pip install peft`).
    """

    _lora_loadable_modules = ["unet", "transformer", "brief_encoder"]
    _adapter_weights: dict[str, float] | None = None

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        weight: float = 1.0,
        weight_name: str = WEIGHT_NAME,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA adapter, and use it together with those that are loaded.

        Args:
            pretrained_model_name_or_path_or_dict: folder of the adapter, repository on the Hub (`user/name`), or its
                tensors by name.
            adapter_name: name for `set_adapters` and `delete_adapters`; `default_0` and so on if unset.
            weight: factor of what the adapter changes; 0 for the base model, 1 for the adapter as it was trained.
            weight_name: name of the file in the folder or repository.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only`, as in Diffusers.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: the adapter is missing, it was made for another network, or the name is in use.
        """
        require_peft()
        source = pretrained_model_name_or_path_or_dict
        tensors, metadata = _read(source, weight_name, kwargs)
        check_adapter(self, tensors)
        loaded = self._adapter_weights or {}
        unused = (f"default_{number}" for number in range(len(loaded) + 1) if f"default_{number}" not in loaded)
        name = adapter_name or next(unused)
        if name in loaded:
            raise ValueError(
                f"`adapter_name` '{name}' is in use; choose another name, or call `delete_adapters('{name}')` first"
            )
        with warnings.catch_warnings():
            # PEFT warns of a second adapter, which is meant here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for component in sorted({key.split(".")[0] for key in tensors}):
                getattr(self, component).load_lora_adapter(
                    tensors, prefix=component, adapter_name=name, metadata=metadata, _pipeline=self
                )
        self._adapter_weights = {**loaded, name: weight}
        self.set_adapters([*self._adapter_weights], [*self._adapter_weights.values()])

    def set_adapters(self, adapter_names: Any, adapter_weights: Any = None) -> None:
        super().set_adapters(adapter_names, adapter_weights)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        known = {name: 1.0 if weight is None else weight for name, weight in zip(names, weights)}
        self._adapter_weights = {**dict.fromkeys(self._adapter_weights or {}, 0.0), **known}

    def delete_adapters(self, adapter_names: Any) -> None:
        super().delete_adapters(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            (self._adapter_weights or {}).pop(name, None)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Add the adapters to the weights of the networks, so that sampling takes no longer than without them."""
        super().fuse_lora(components=components or self._adapted(), **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Undo `fuse_lora`; the weights are those of the base model but for rounding."""
        super().unfuse_lora(components=components or self._adapted(), **kwargs)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Those that are fused stay in the weights."""
        for component in self._adapted():
            getattr(self, component).unload_lora()
        self._adapter_weights = None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline.

        Raises:
            ValueError: adapters are loaded, whose layers a folder of a pipeline cannot contain.
        """
        if self._adapted():
            raise ValueError(
                "LoRA adapters are loaded, which a saved pipeline cannot contain; call `fuse_lora()` to save their "
                "effect, and then `unload_lora_weights()` in any case"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _adapted(self) -> list[str]:
        """Return the names of the components that have adapters."""
        return [name for name in self._lora_loadable_modules if getattr(getattr(self, name, None), "peft_config", None)]


def require_peft() -> None:
    """Raise an ImportError if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError("LoRA adapters need PEFT, which is not installed; run `pip install peft`") from None


def _read(source: Any, weight_name: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict | None]:
    """Return the tensors of an adapter, and its rank, alpha and layers. Raises a ValueError if it is missing."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    if isinstance(source, (str, os.PathLike)):
        path = Path(source, options.get("subfolder") or "")
        if path.is_dir() and not (path / weight_name).is_file():
            raise ValueError(f"{path} has no {weight_name}; pass the folder of a LoRA adapter")
        if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
            raise ValueError(f"{source} does not exist; pass the folder of a LoRA adapter, or a repository of the Hub")
    tensors, _, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(source) if isinstance(source, os.PathLike) else source,
        weight_name=weight_name,
        use_safetensors=True,
        return_lora_metadata=True,
        **options,
    )
    return tensors, metadata


def check_adapter(pipeline: Any, tensors: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first layer of an adapter which the networks of `pipeline` do not have."""
    if not tensors:
        raise ValueError("the LoRA adapter is empty")
    for key in sorted(tensors):
        if (match := _PAIR.fullmatch(key)) is None:
            raise ValueError(f"the LoRA adapter has a tensor '{key}', which is not in the format of Diffusers")
        component, layer = match["component"], match["layer"]
        network = getattr(pipeline, component, None)
        if network is None or component not in pipeline._lora_loadable_modules:
            raise ValueError(f"the LoRA adapter was made for another network: this model has no {component}")
        try:
            module = network.get_submodule(layer)
        except AttributeError:
            raise ValueError(f"the LoRA adapter was made for another network, which has a layer {layer}") from None
        own = tuple(module.weight.shape)
        a, b = (tensors.get(f"{component}.{layer}.{part}.weight") for part in ("lora_A", "lora_B"))
        if a is None or b is None:
            raise ValueError(f"the LoRA adapter is incomplete: it has only one of lora_A and lora_B of {layer}")
        if (made_for := (b.shape[0], *a.shape[1:])) != own:
            raise ValueError(
                f"the LoRA adapter was made for another network: its layer {layer} has weights of the shape "
                f"{made_for}, and that of this model {own}"
            )
