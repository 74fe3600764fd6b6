//! HTTP/1.0 and 1.1, both ends of a connection.
//!
//! The parsers are pure and strict: what two readers could frame in two ways is refused, because
//! the application behind the proxy is the other reader. Around them a connection is one value that
//! the server, or the client, and the two bodies of its exchange share. While it idles it holds
//! that value and nothing else; heads and content are read through the worker's buffer.

mod chunk;
mod client;
mod connection;
mod decode;
mod encode;
mod parse;
mod server;

pub use chunk::{ChunkDecoder, ChunkError};
pub use client::Connection;
pub use decode::Decoded;
pub use parse::{
    Framing, HEADERS_MAX, HeadError, RequestHead, ResponseHead, parse_request_head,
    parse_response_head,
};
pub use server::{HEAD_TIMEOUT, IDLE_TIMEOUT, serve};
