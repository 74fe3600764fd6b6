//! A proxy as the trust stream sees one: what it sends is what a test says.

use steadfast_api::UnixTime;
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::stream_request::Message as Up;
use steadfast_api::trust::v1::stream_response::Message as Down;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{Mesh, WAIT};

pub struct Proxy {
    up: mpsc::Sender<v1::StreamRequest>,
    down: Streaming<v1::StreamResponse>,
}

pub fn instance(pod_uid: &str) -> v1::Instance {
    v1::Instance { pod_uid: pod_uid.into(), started_at: Some(UnixTime::from_secs(7).into()) }
}

pub fn hello(token: &str, pod_uid: &str) -> Up {
    Up::Hello(v1::Hello {
        token: token.into(),
        instance: Some(instance(pod_uid)),
        version: "1".into(),
        ..Default::default()
    })
}

pub fn ack(pod_uid: &str, nonce: u64) -> Up {
    Up::Ack(v1::Ack {
        instance: Some(instance(pod_uid)),
        nonce,
        seq: 1,
        digest: vec![7; 32],
        ..Default::default()
    })
}

pub async fn open(mesh: &Mesh, first: Option<Up>) -> Result<Proxy, Status> {
    let (up, requests) = mpsc::channel(8);
    up.send(v1::StreamRequest { message: first }).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let down = mesh.trust().await.stream(requests).await?.into_inner();
    Ok(Proxy { up, down })
}

pub async fn web(mesh: &Mesh) -> Proxy {
    open(mesh, Some(hello("web", "uid-of-web-1"))).await.unwrap()
}

impl Proxy {
    pub async fn send(&self, message: Option<Up>) {
        self.up.send(v1::StreamRequest { message }).await.unwrap();
    }

    pub async fn next(&mut self) -> Result<Option<Down>, Status> {
        let next = tokio::time::timeout(WAIT, self.down.message()).await.unwrap();
        match next? {
            Some(response) => {
                assert!(response.server_time.is_some());
                Ok(response.message)
            }
            None => panic!("the stream has ended without a word"),
        }
    }

    pub async fn bundle(&mut self) -> v1::Bundle {
        match self.next().await.unwrap() {
            Some(Down::Bundle(bundle)) => bundle,
            other => panic!("no bundle but {other:?}"),
        }
    }
}
