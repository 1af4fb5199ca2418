"""Tokenizers and models as transformers loads them, with what it refuses as errors of four parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.errors import InputError, SafetyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.tasks.checkpoint import Checkpoint


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; no code that comes with it is run."""
    from transformers import AutoTokenizer

    with refusals(checkpoint):
        return AutoTokenizer.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)


def open_model(
    loader: Any, checkpoint: Checkpoint, *, dtype: Any, spare: Callable[[str], bool] = lambda name: False
) -> Any:
    """The model in memory, ready to infer: weights mapped from the file where its dtype is the one asked for.

    InputError where the file lacks a weight of the config, but for names that are `spare`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with refusals(checkpoint):
        model, report = loader.from_pretrained(
            str(checkpoint.path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    missing = sorted(name for name in report["missing_keys"] if not spare(name))
    if missing or report["mismatched_keys"]:
        raise InputError(
            f"loading {checkpoint.shown}",
            found=f"weights missing or of another shape: {', '.join(missing[:3]) or report['mismatched_keys']}",
            allowed="a checkpoint that holds every weight of its config",
            do="save or download the model again",
        )
    return model.eval()


class refusals:
    """What transformers refuses or cannot read, as errors of four parts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        damaged = type(error).__name__ == "SafetensorError"
        if not damaged and not isinstance(error, ValueError | OSError | KeyError | ImportError | RuntimeError):
            return
        if "trust_remote_code" in str(error):
            raise SafetyError(
                f"loading {self.checkpoint.shown}",
                found="it needs Python code that comes with the model",
                allowed="architectures that transformers itself has",
                do="choose another checkpoint",
            ) from error
        reason = str(error).strip().splitlines()
        raise InputError(
            f"loading {self.checkpoint.shown} with transformers",
            found=f"{type(error).__name__}: {reason[0] if reason else ''}",
            allowed="a model folder as save_pretrained writes it",
            do="check the files of the folder, or update transformers",
        ) from error
