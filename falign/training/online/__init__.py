"""Runs on the policy's own samples: rollouts, rewards, and several updates on each."""
