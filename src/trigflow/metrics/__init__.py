"""How good are the samples: Frechet distance, precision and recall, and the features they are measured in.

reference = Reference(real_images, feature_extractor("digits"))
scores = reference.score(fake_images)
"""

from trigflow.metrics.evaluate import Reference, Scores, evaluate
from trigflow.metrics.features import (
    FeatureExtractor,
    FeatureNet,
    PixelFeatures,
    default_features,
    extract,
    feature_extractor,
)
from trigflow.metrics.frechet import GaussianStatistics, RunningStatistics, frechet_distance, gaussian_statistics
from trigflow.metrics.manifold import PrecisionRecall, precision_recall

__all__ = [
    "FeatureExtractor",
    "FeatureNet",
    "GaussianStatistics",
    "PixelFeatures",
    "PrecisionRecall",
    "Reference",
    "RunningStatistics",
    "Scores",
    "default_features",
    "evaluate",
    "extract",
    "feature_extractor",
    "frechet_distance",
    "gaussian_statistics",
    "precision_recall",
]
