"""How good are the samples: Frechet distance, precision and recall, and the features they are measured in.

reference = Reference(real_images, feature_extractor("digits"))
scores = reference.score(fake_images)
"""

from trigflow.evaluation.features.extractors import (
    FeatureExtractor,
    FeatureNet,
    PixelFeatures,
    default_features,
    extract,
    feature_extractor,
)
from trigflow.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance, gaussian_statistics
from trigflow.evaluation.manifold import Overlap, PrecisionRecall, neighbour_radii, overlap, precision_recall
from trigflow.evaluation.scores import Reference, Scores, evaluate
from trigflow.evaluation.shared_work import Processes
from trigflow.evaluation.statistics_file import ReferenceStatistics, read_reference, write_reference
from trigflow.evaluation.streaming import gather, stream_features

__all__ = [
    "FeatureExtractor", "FeatureNet", "GaussianStatistics", "Overlap", "PixelFeatures", "PrecisionRecall", "Processes",
    "Reference", "ReferenceStatistics", "RunningStatistics", "Scores", "default_features", "evaluate", "extract",
    "feature_extractor", "frechet_distance", "gather", "gaussian_statistics", "neighbour_radii", "overlap",
    "precision_recall", "read_reference", "stream_features", "write_reference",
]  # fmt: skip
