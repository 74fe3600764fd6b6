//! The policy model and authorize(): pure, shared by control and proxy
