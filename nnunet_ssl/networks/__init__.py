"""Networks that expose what the methods need, around the U-Nets that nnU-Net builds."""
