"""DALI and VIP-ANT from nothing on the sounding world: demonstrations, ablation, report."""
