"""Object detection: semi-supervised, source-free, few-shot and open-vocabulary systems."""
