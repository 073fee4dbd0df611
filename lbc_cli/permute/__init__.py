"""Channel permutation: another order of the channels inside a network, that N:M pruning loses less to.

    permutation = permute(model, targets, image_size)

Source: J. Pool and C. Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021. Which channels go together is found on
the torch.fx graph, for any structure that `rules` knows: residual sums, batch and layer norms, depthwise convolutions,
squeeze and excitation, flattening, the residual stream and the hidden layers of transformers. The network keeps its
architecture, its shapes and, up to the rounding of sums in another order, its function: logits in float64 are compared
before anything is kept.

    spaces   dimensions that must keep one order       rules    what each operator does to them
    graph    the spaces of a model                     search   a better order
    apply    the order in the weights, and the check
"""

from lbc_cli.permute.apply import ChannelSet, Permutation, permute

__all__ = ["ChannelSet", "Permutation", "permute"]
