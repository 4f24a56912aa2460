"""Whether a metric is better when larger or smaller, by its name."""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["max", "min"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that a name may end in, beside what it measures: the stage, how it was averaged, where it comes from.
ASIDE = _words(
    "val valid validation train training test testing dev eval holdout epoch step dataloader idx mean avg average "
    "total sum overall all macro micro weighted ema smoothed score rate s ms sec seconds"
)
SMALLER = _words(
    "loss losses lost err error errors perplexity ppl nll bce xent ce mse rmse msle rmsle nrmse mae mape smape "
    "wmape mase rmsd huber l1 l2 wer cer mer ter eer der per fid kid lpips fad kl kld jsd emd wasserstein mmd hd95 "
    "chamfer epe ade fde ece brier crps deviance divergence distance dist discrepancy latency cost regret risk "
    "residual residuals bpc bpd bpb nelbo fpr fnr frr far edit div"
)
LARGER = _words(
    "acc accuracy f1 fbeta auc auroc auprc ap map iou miou jaccard dice precision recall sensitivity specificity "
    "bleu rouge meteor psnr ssim r2 kappa mcc ndcg mrr reward return likelihood similarity correct tpr tnr elbo"
)
ENDINGS = ("loss", "error", "perplexity", "entropy", "divergence", "distance", "latency")  # of words written as one
SMALLER_PAIRS = frozenset({"cross entropy", "false positive", "false negative", "per dim", "per char", "per byte"})
NEGATED = _words("mean root median max log brier")  # scikit-learn's `neg_mean_squared_error`


def better(name: str) -> Mode | None:
    """Whether the metric of that name is better when smaller or larger; None where its words do not say.

    The last word counts that tells what is measured; a first word "loss" counts as well, as in ``loss/box``.

    Example:
        >>> [better(name) for name in ("val_loss/dataloader_idx_0", "top5_error", "val/acc_epoch", "MeanSquaredError")]
        ['min', 'min', 'max', 'min']
        >>> better("objective") is None
        True
    """
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+", name.replace("IoU", "iou"))]
    while words and (words[-1] in ASIDE or words[-1].isdigit()):
        words.pop()
    while words and (words[0] in ASIDE or words[0].isdigit()):
        words.pop(0)
    if not words:
        return None
    smaller, larger = _falls(words), _bare(words[-1]) in LARGER
    if words[0] in ("neg", "negative") and words[-1] == "likelihood":
        return "min"
    if words[0] == "neg" and smaller and words[1] in NEGATED:
        return "max"
    if smaller or (words[0] in ("loss", "losses") and not larger):
        return "min"
    return "max" if larger else None


def _falls(words: list[str]) -> bool:
    last = _bare(words[-1])
    pair = " ".join(words[-2:])
    return last in SMALLER or (last != "entropy" and last.endswith(ENDINGS)) or pair in SMALLER_PAIRS


def _bare(word: str) -> str:
    """Without a number at its end, unless that belongs to it."""
    return word if word in SMALLER or word in LARGER else word.rstrip("0123456789")
