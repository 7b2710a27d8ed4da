"""Configurations: what is refused and in which words, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ferrovae.training.configuration import TrainVAE, TrainVQVAE
from ferrovae.training.errors import ConfigurationError
from ferrovae.training.serialization import MAX_JSON_BYTES, from_dict, load_configuration, read_json, to_dict


def changed(config):
    """Every field at another value than its default, so that none can be lost on the way."""
    values = {
        "data": "elsewhere", "validation_fraction": 0.2, "likelihood": "gaussian", "sigma": 0.5, "binarize": "none",
        "dequantize": True, "batch_size": 7, "epochs": 11, "max_steps": 5, "learning_rate": 0.5,
        "final_learning_rate": 0.25, "schedule": "cosine", "clip_norm": 2.0, "precision": "bf16", "ema_decay": 0.9,
        "patience": 4, "validate_every": 2, "checkpoint_every": 9, "keep_checkpoints": 8, "log_every": 3, "seed": 6,
        "threads": 1, "device": "cpu", "run_dir": "there", "latent_dim": 3, "network": "conv", "hidden": (5, 6, 7),
        "activation": "relu", "width": 12, "depth": 1, "kl_warmup_epochs": 1.5, "free_bits": 0.1, "codebook_size": 17,
        "code_dim": 5, "downsample": 2, "commitment_weight": 0.25, "codebook_decay": 0.8, "dead_code_threshold": 0.0,
        "rotation_trick": True, "quantizer": "residual-vq", "num_quantizers": 3, "levels": (4, 3),
    }  # fmt: skip
    if config is TrainVQVAE:
        values["likelihood"], values["sigma"] = "gaussian", 2.0
    fields = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in fields})


@pytest.mark.parametrize("cls", [TrainVAE, TrainVQVAE])
def test_round_trip_keeps_every_field(cls) -> None:
    config = changed(cls)
    defaults = cls()
    same = [f.name for f in dataclasses.fields(cls) if getattr(config, f.name) == getattr(defaults, f.name)]
    assert same in ([], ["likelihood"])  # the list above is complete
    config.validate()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat' for model 'vae'"),
        ({"model": "gan"}, "model is 'gan', expected one of vae, vqvae"),
        ({"model": ["vae"]}, "model is ['vae']"),
        ({"epochs": "3"}, "epochs is '3', expected int"),
        ({"epochs": True}, "epochs is True, expected int"),
        ({"epochs": 2.0}, "epochs is 2.0, expected int"),
        ({"hidden": [3, "x"]}, "hidden is [3, 'x'], expected a list of int"),
        ({"hidden": 3}, "hidden is 3, expected a list of int"),
        ({"likelihood": "poison"}, "likelihood is 'poison', expected one of 'bernoulli'"),
        ({"sigma": "small"}, "sigma is 'small', expected float or one of 'learned'"),
        ({"clip_norm": -1}, "clip_norm is -1.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a positive number"),
    ],
)
def test_bad_values_are_named(change, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_dict({"model": "vae", **change}, "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_warmup_epochs": 21}, "kl_warmup_epochs is 21, longer than the 20 epochs of training"),
        ({"batch_size": 0}, "batch_size is 0, expected an integer of at least 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a number between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": 0.0, "patience": 2}, "patience needs validation images"),
        ({"sigma": 0.5}, "only 'gaussian' has a sigma"),
        ({"likelihood": "gaussian", "binarize": "stochastic"}, "binary pixels need 'bernoulli'"),
        ({"dequantize": True}, "dequantize is set but likelihood is 'bernoulli'"),
        ({"schedule": "constant", "final_learning_rate": 1e-5}, "schedule is 'constant'"),
        ({"hidden": ()}, "hidden is (), expected one or more positive widths"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_meant(values, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrainVAE(**values).validate()
    assert message in str(caught.value)


def test_an_mlp_gets_one_thread_unless_told() -> None:
    assert TrainVAE().torch_threads == 1
    assert TrainVAE(threads=2).torch_threads == 2
    assert TrainVAE(network="conv").torch_threads is None
    assert TrainVQVAE().torch_threads is None


def test_downsample_is_a_power_of_two() -> None:
    with pytest.raises(ConfigurationError, match="downsample is 3, expected a power of two"):
        TrainVQVAE(downsample=3).validate()


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigurationError, match=r"is not a run: it has no config\.json"):
        load_configuration(tmp_path)
    path.write_bytes(b"{" + b" " * MAX_JSON_BYTES + b"}")
    with pytest.raises(ConfigurationError, match="larger than"):
        load_configuration(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ConfigurationError, match="holds list, expected a JSON object"):
        load_configuration(tmp_path)
    for broken in ("{", "[" * 100_000, '"\udcff"'):
        path.write_bytes(broken.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigurationError, match=r"config\.json: "):
            read_json(path)
