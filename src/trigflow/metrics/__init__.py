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
from trigflow.metrics.manifold import Overlap, PrecisionRecall, neighbour_radii, overlap, precision_recall
from trigflow.metrics.processes import Processes
from trigflow.metrics.reference import ReferenceStatistics, read_reference, write_reference
from trigflow.metrics.stream import gather, stream_features

__all__ = [
    "FeatureExtractor",
    "FeatureNet",
    "GaussianStatistics",
    "Overlap",
    "PixelFeatures",
    "PrecisionRecall",
    "Processes",
    "Reference",
    "ReferenceStatistics",
    "RunningStatistics",
    "Scores",
    "default_features",
    "evaluate",
    "extract",
    "feature_extractor",
    "frechet_distance",
    "gather",
    "gaussian_statistics",
    "neighbour_radii",
    "overlap",
    "precision_recall",
    "read_reference",
    "stream_features",
    "write_reference",
]
