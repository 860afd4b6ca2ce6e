"""What a finished run is used for: answers, explanations, a page, exports."""
