"""What is asked: a plan and its fields, plan files, Hugging Face configs, and what refuses them."""
