//! gRPC's framing of a trust stream.
//!
//! tonic keeps, one each way, a buffer for the largest message that a stream has ever carried: for
//! every proxy the room of its hello and of a bundle, between which next to nothing is sent. Here a
//! buffer lasts as long as the message in it. Nothing is compressed, and what a client sends is
//! bounded before it is kept.

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap};
use http::{HeaderValue, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming};
use prost::Message as _;
use steadfast_api::trust::v1;
use tonic::Status;
use tonic::body::Body;

/// What a client sends on its stream.
#[derive(Debug)]
pub struct Requests {
    body: Incoming,
    /// The beginning of a message; empty and without room between two of them.
    unread: BytesMut,
}

impl Requests {
    /// From the body of the request that opens the stream.
    pub fn new(body: Incoming) -> Self {
        Self { body, unread: BytesMut::new() }
    }

    /// The next message; `None`: the client has ended. May be dropped and called again.
    ///
    /// # Errors
    /// The connection broke, or what came is no message of ours.
    pub async fn message(&mut self) -> Result<Option<v1::StreamRequest>, Status> {
        loop {
            if let Some(message) = take(&mut self.unread)? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    // What is no data is the trailers, and nothing is said there.
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(Status::from_error(Box::new(error))),
                None if self.unread.is_empty() => return Ok(None),
                None => return Err(Status::invalid_argument("a message is cut off")),
            }
        }
    }
}

/// The first message of these bytes, if all of it is there.
fn take(unread: &mut BytesMut) -> Result<Option<v1::StreamRequest>, Status> {
    let Some((&[compressed, head @ ..], rest)) = unread.split_first_chunk::<HEAD_BYTES>() else {
        return Ok(None);
    };
    if compressed != 0 {
        return Err(Status::unimplemented("a compressed message"));
    }
    let length = u32::from_be_bytes(head) as usize;
    if length > MESSAGE_BYTES_MAX {
        let what = format!("a message of {length} bytes; {MESSAGE_BYTES_MAX} are taken");
        return Err(Status::out_of_range(what));
    }
    let Some(message) = rest.get(..length) else { return Ok(None) };
    let message = v1::StreamRequest::decode(message)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    unread.advance(HEAD_BYTES + length);
    if unread.is_empty() {
        *unread = BytesMut::new();
    }
    Ok(Some(message))
}

/// A message as it is sent: these fields of it, and then those of `more`, which are encoded already.
/// Protobuf reads what stands one after the other as one message.
pub fn message(fields: &v1::StreamResponse, more: &[u8]) -> Frame<Bytes> {
    let fields = fields.encode_to_vec();
    let length = fields.len() + more.len();
    let mut framed = Vec::with_capacity(HEAD_BYTES + length);
    framed.push(0);
    // A bundle that is stored is shorter than 4 GiB.
    framed.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    framed.extend_from_slice(&fields);
    framed.extend_from_slice(more);
    Frame::data(framed.into())
}

/// The last that is sent on a stream: why it ends.
pub fn end(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // A text that is no header is left out; the code is there before it.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

/// The answer to the request that opens a stream.
pub fn response(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;
/// A request of 8 KiB must still arrive, to be refused by its own code.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use steadfast_api::trust::v1::stream_request::Message as FromProxy;
    use steadfast_api::trust::v1::stream_response::Message as ToProxy;

    use super::*;

    fn ack(nonce: u64) -> v1::StreamRequest {
        let ack = v1::Ack { nonce, ..v1::Ack::default() };
        v1::StreamRequest { message: Some(FromProxy::Ack(ack)) }
    }

    fn sent(message: &v1::StreamRequest) -> Vec<u8> {
        let encoded = message.encode_to_vec();
        let length = u32::try_from(encoded.len()).unwrap().to_be_bytes();
        [&[0], &length[..], &encoded].concat()
    }

    #[test]
    fn messages_are_read_however_they_are_cut_and_leave_no_buffer() {
        let (messages, mut read) = ([ack(1), ack(300), ack(0)], Vec::new());
        let mut unread = BytesMut::new();
        for byte in messages.iter().flat_map(sent) {
            unread.extend_from_slice(&[byte]);
            read.extend(take(&mut unread).unwrap());
        }
        assert_eq!(read, messages);
        assert_eq!(unread.capacity(), 0);
        unread.extend_from_slice(&messages.each_ref().map(sent).concat());
        let read = [(); 3].map(|()| take(&mut unread).unwrap().unwrap());
        assert_eq!(read, messages);
        assert_eq!((take(&mut unread).unwrap(), unread.capacity()), (None, 0));
    }

    #[test]
    fn what_is_too_long_or_compressed_or_no_message_is_refused_at_once() {
        let refused = |bytes: &[u8]| take(&mut BytesMut::from(bytes)).unwrap_err().code();
        let too_long = u32::try_from(MESSAGE_BYTES_MAX + 1).unwrap().to_be_bytes();
        assert_eq!(refused(&[&[0], &too_long[..]].concat()), tonic::Code::OutOfRange);
        assert_eq!(refused(&[1, 0, 0, 0, 0]), tonic::Code::Unimplemented);
        assert_eq!(refused(&[0, 0, 0, 0, 1, 0xff]), tonic::Code::InvalidArgument);
    }

    #[test]
    fn fields_and_what_is_encoded_already_are_one_message() {
        let bundle = v1::Bundle { seq: 7, anchors: vec![vec![1; 300]], ..v1::Bundle::default() };
        let server_time = Some(prost_types::Timestamp { seconds: 5, nanos: 6 });
        let whole = v1::StreamResponse { server_time, message: Some(ToProxy::Bundle(bundle)) };
        let more = v1::StreamResponse { server_time: None, ..whole.clone() }.encode_to_vec();
        let fields = v1::StreamResponse { server_time, message: None };
        let framed = message(&fields, &more).into_data().unwrap();
        let (head, encoded) = framed.split_first_chunk::<HEAD_BYTES>().unwrap();
        assert_eq!(usize::from(head[4]) + 256 * usize::from(head[3]), encoded.len());
        assert_eq!(v1::StreamResponse::decode(encoded).unwrap(), whole);
    }
}
