"""The papers' evaluation protocols.

Functions that evaluate maps take ``predict``, a function from normalised images to logits and a map, such as
:func:`attention_of` and :func:`gradcam_of` return. Shares lie in [0, 1]. scikit-learn, scikit-image and captum are
needed only by the functions that mention them.
"""

from attnkern.evaluation.anchors import AnchorUsage, perplexity, usage
from attnkern.evaluation.classification import McNemar, Top1, mcnemar, top1
from attnkern.evaluation.crossdomain import (
    DirectTransfer,
    LinearSvm,
    Whitening,
    direct_transfer,
    features_at,
    linear_svm,
    zca,
)
from attnkern.evaluation.inputs import collect
from attnkern.evaluation.interpretability import Interpretability, frequency, interpretability_score, occlude
from attnkern.evaluation.localisation import (
    Localisation,
    binarise,
    box_masks,
    jaccard,
    localisation,
    pointing_game,
    rescale,
    tight_boxes,
    upsample,
)
from attnkern.evaluation.maps import attention_of, gradcam_of, map_of
from attnkern.evaluation.orientation import Orientation, orient, orientation, signed_scores
from attnkern.evaluation.query import QueryDriven, pool_attention, query_driven
from attnkern.evaluation.rectangles import (
    EquivarianceError,
    catching_rate,
    descriptive_order,
    equivariance_distance,
    equivariance_errors,
    fitting_rate,
    missing_rate,
    rectangle_mask,
    transform_images,
    transform_rectangle,
)
from attnkern.evaluation.robustness import Fooling, fgsm, fooling_rate
from attnkern.evaluation.segmentation import ClassJaccard, combine, weak_segmentation

__all__ = [
    "AnchorUsage",
    "ClassJaccard",
    "DirectTransfer",
    "EquivarianceError",
    "Fooling",
    "Interpretability",
    "LinearSvm",
    "Localisation",
    "McNemar",
    "Orientation",
    "QueryDriven",
    "Top1",
    "Whitening",
    "attention_of",
    "binarise",
    "box_masks",
    "catching_rate",
    "collect",
    "combine",
    "descriptive_order",
    "direct_transfer",
    "equivariance_distance",
    "equivariance_errors",
    "features_at",
    "fgsm",
    "fitting_rate",
    "fooling_rate",
    "frequency",
    "gradcam_of",
    "interpretability_score",
    "jaccard",
    "linear_svm",
    "localisation",
    "map_of",
    "mcnemar",
    "missing_rate",
    "occlude",
    "orient",
    "orientation",
    "perplexity",
    "pointing_game",
    "pool_attention",
    "query_driven",
    "rectangle_mask",
    "rescale",
    "signed_scores",
    "tight_boxes",
    "top1",
    "transform_images",
    "transform_rectangle",
    "upsample",
    "usage",
    "weak_segmentation",
    "zca",
]
