"""The digit classifier: trained once, then loaded from .cache."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import sklearn
from scipy.ndimage import affine_transform
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

HERE = Path(__file__).parent


def load() -> VotingClassifier:
    """Return the trained model; the first time this takes a few seconds."""
    path = _cache_path()
    if path.exists():
        return joblib.load(path)
    model = _train()
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    joblib.dump(model, unfinished)
    unfinished.replace(path)  # at once: a second worker never reads half a file
    return model


def make() -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return the handler: a factory, for a process that has nothing else to do."""
    model = load()
    return lambda pictures: model.predict_proba(np.stack(pictures))


def accuracy(model: VotingClassifier) -> float:
    """Return the share of right answers on digits that were kept from training."""
    _, images, _, digits = _split()
    return float(model.score(images, digits))


def _cache_path() -> Path:
    """Name the file after what made it: another scikit-learn or an edit retrains."""
    source = zlib.crc32(Path(__file__).read_bytes())
    return HERE / ".cache" / f"digits-{sklearn.__version__}-{source:08x}.joblib"


def _train() -> VotingClassifier:
    images, _, digits, _ = _split()
    copies = [images, *(_distort(images, seed) for seed in range(8))]
    # The support vectors are right most often; the trees say how sure to be.
    vectors = CalibratedClassifierCV(SVC(C=10, gamma=0.0015), ensemble=False, cv=2)
    trees = RandomForestClassifier(50, min_samples_leaf=3, random_state=0)
    model = VotingClassifier([("vectors", vectors), ("trees", trees)], voting="soft")
    return model.fit(np.concatenate(copies), np.tile(digits, len(copies)))


def _split() -> list[np.ndarray]:
    images, digits = load_digits(return_X_y=True)
    return train_test_split(images, digits, stratify=digits, random_state=0)


def _distort(images: np.ndarray, seed: int) -> np.ndarray:
    """Turn, slant, stretch, shift: people draw in more ways than the data set shows."""
    random = np.random.default_rng(seed)
    middle = np.array([3.5, 3.5])
    result = np.empty_like(images)
    for image, changed in zip(images, result):
        turn, slant = random.uniform([-0.2, -0.45], [0.2, 0.45])
        tall, wide = random.uniform(0.8, 1.2, size=2)
        matrix = np.array([[tall, turn], [slant, wide]])
        offset = middle - matrix @ middle + [0, random.uniform(-0.6, 0.6)]
        square = image.reshape(8, 8)
        changed[:] = affine_transform(square, matrix, offset, order=1).ravel()
    return result


if __name__ == "__main__":
    print(f"{accuracy(load()):.1%} of the digits kept from training are right")
