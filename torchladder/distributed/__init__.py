"""Many ranks: who they are, how they are laid out, and how a model is spread over them."""
