"""What a network's layers do to signals and gradients: one file for each question, a function and its plots.

Signals
    depth_moments: how do means and variances of channels grow with depth?
    gaussianity: are pre-activations Gaussian?
    canonical_error: how far is each layer from the uncorrelated units that normalising by weights assumes?
    power: do channels become constants, or samples alike, with depth?
    self_normalizing: do layers keep mean 0 and variance 1 by themselves?
    mean_field: do signals keep their size and their differences, and do gradients come back whole?

Gradients
    gradient_growth: do gradients explode or vanish with depth?
    jacobian: how much does each layer stretch a small change?
    matrix_products: does a product of weights stretch all directions alike?
    gradient_histogram: are the gradients of a weight alike, or do a few dwarf the rest?
    output_gradients: does every image pull the outputs the same way?
    sign_coherence: do images and positions agree on where a weight should go?
    gradient_noise: how noisy are the steps of small batches?

Learning rates and training
    line_profile: how large a step against the gradient does the loss stand?
    fisher: how sharp is the landscape, and how large a learning rate does that allow?
    rate_ladder: how large a learning rate does the network bear?
    divergence_movie: where does a run break that diverges?
    covariate_shift: how much do the inputs of hidden layers move during training?
    decay_equivalence: is weight decay before a normaliser only a learning rate?
    equivalent_ridge: what weight decay does a norm amount to on noisy inputs?
    sparsity: are an auto-encoder's codes sparse, and does its regulariser make them so?

What they share: :mod:`.diagnosis` (what is asked and answered), :mod:`.plot` (what is drawn), :mod:`.checks` (asking by
name), :mod:`.quiet` (running a copy), and ways of looking: passes, linear_calls, preactivations, channels, products,
spectrum, loss, input_history. Theory alone: mean_field_maps, fixed_points, moment_map, auto_rate, fisher_mean_field.
"""
