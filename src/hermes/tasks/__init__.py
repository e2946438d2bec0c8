"""What people ask of a model: text, embeddings, labels. The same for a streamed model and a resident one."""
