"""Shapes by the name of a model that has them: `ferrovae bench nearest_code --shapes dac var`.

N tokens a step, K codes, D dimensions of a code, Q quantizers one after another, H heads side by side. An operation
takes the letters it has. N is what a training step of that model brings: 8192 (32 images of 16 x 16 tokens), 32768
(32 images of 32 x 32), 4800 (64 seconds of audio at 75 frames), 65536 (video, or writing tokens ahead of training).
"""

from __future__ import annotations

from collections.abc import Sequence

MODELS: dict[str, dict[str, int]] = {
    "vqgan": {"N": 8192, "K": 1024, "D": 256},
    "vqgan-8192": {"N": 8192, "K": 8192, "D": 256},
    "vqgan-16384": {"N": 8192, "K": 16384, "D": 256},
    "sd-vq-f4": {"N": 65536, "K": 8192, "D": 3},
    "encodec": {"N": 4800, "K": 1024, "D": 128, "Q": 8},
    "musicgen": {"N": 4800, "K": 2048, "D": 128, "Q": 4},
    "dac": {"N": 4800, "K": 1024, "D": 8, "Q": 9},
    "dac-24khz": {"N": 4800, "K": 1024, "D": 8, "Q": 32},
    "mimi": {"N": 4800, "K": 2048, "D": 256, "Q": 32},
    "speechtokenizer": {"N": 4800, "K": 1024, "D": 1024, "Q": 8},
    "wavtokenizer": {"N": 4800, "K": 4096, "D": 512},
    "llamagen": {"N": 8192, "K": 16384, "D": 8},
    "var": {"N": 21760, "K": 4096, "D": 32},
    "unitok": {"N": 8192, "K": 4096, "D": 8, "H": 8},
    "ta-titok": {"N": 8192, "K": 8192, "D": 64},
    "emu3": {"N": 65536, "K": 32768, "D": 4},
    "vqgan-lc": {"N": 8192, "K": 100000, "D": 8},
    "ibq": {"N": 8192, "K": 16384, "D": 256},
    "ibq-262144": {"N": 4096, "K": 262144, "D": 256},
    "open-magvit2": {"N": 4096, "K": 262144, "D": 18},
    "leech": {"N": 8192, "K": 196560, "D": 24},
    "rq-vae": {"N": 8192, "K": 16384, "D": 256, "Q": 4},
    "tiger": {"N": 8192, "K": 256, "D": 32, "Q": 3},
    "cosmos-fsq": {"N": 65536, "K": 64000, "D": 6},
    "stable-audio": {"N": 4800, "K": 2048, "D": 128, "Q": 4},
    "simvq": {"N": 8192, "K": 1024, "D": 128},
}


def known(texts: Sequence[str]) -> None:
    """Refuse what is neither a model's name nor sizes; needs no operation, so it is the first thing done.

    Raises:
        ValueError: in one sentence that names the text.
    """
    for text in texts:
        if text.lower() not in MODELS and _sizes(text) is None:
            raise ValueError(
                f"bench: shape {text!r} is unknown, expected sizes such as 8192,1024,64 or one of {', '.join(MODELS)}"
            )


def for_operation(operation: str, own: Sequence[dict[str, int]], texts: Sequence[str]) -> list[dict[str, int]]:
    """The shapes that an operation is measured at: those of `texts`, or its own where none are given.

    Raises:
        ValueError: sizes that are not as many as the operation's letters, or letters that it does not have.
    """
    if not texts:
        return [dict(shape) for shape in own]
    known(texts)
    return [_shape(operation, own, text) for text in texts]


def fits(own: Sequence[dict[str, int]], text: str) -> bool:
    """Whether a shape of that text can be had by an operation with these shapes of its own."""
    try:
        for_operation("", own, [text])
    except ValueError:
        return False
    return True


def _shape(operation: str, own: Sequence[dict[str, int]], text: str) -> dict[str, int]:
    letters = list(own[0])
    if text.lower() in MODELS:
        model = MODELS[text.lower()]
        missing = [letter for letter in letters if letter not in model]
        if missing or "K" not in letters:
            lack = f"no {', '.join(missing)}, which {operation} needs" if missing else f"codes, {operation} has none"
            raise ValueError(f"bench: shape {text!r} has {lack}")
        return {letter: model[letter] for letter in letters}
    sizes = _sizes(text) or []
    for shape in own:
        if len(shape) == len(sizes):
            return dict(zip(shape, sizes, strict=True))
    known = " or ".join(dict.fromkeys(",".join(shape) for shape in own))
    raise ValueError(f"bench: shape {text!r} has {len(sizes)} sizes, expected {known} for {operation}")


def _sizes(text: str) -> list[int] | None:
    """Positive integers between commas, or None."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return None
    return [int(part) for part in parts]
