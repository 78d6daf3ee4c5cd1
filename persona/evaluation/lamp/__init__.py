"""LaMP (Salemi et al. 2023, arXiv 2304.11406): personalised language tasks, with PPlug, LoRA and text beside ours."""
