"""Online runs: rollouts from the policy, their rewards, and several updates on each."""
