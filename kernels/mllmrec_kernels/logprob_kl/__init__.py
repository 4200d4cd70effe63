"""Per-token log-prob, entropy and KL from hidden states, without holding tokens x vocabulary."""

from mllmrec_kernels.logprob_kl.api import LogprobOutput as LogprobOutput
from mllmrec_kernels.logprob_kl.api import check_implementation as check_implementation
from mllmrec_kernels.logprob_kl.api import compute_logprobs as compute_logprobs
from mllmrec_kernels.logprob_kl.vocab_sharding import VocabSharding as VocabSharding
