"""Pure rules that cut rows into batches and pieces: a function of the data and the settings alone."""
