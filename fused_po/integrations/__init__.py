"""What puts fused_po under other people's trainers and models; each file imports its package when it is called."""
