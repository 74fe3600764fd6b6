//! A proxy as the trust stream sees one: what it sends is what a test says.

use std::sync::Arc;

use steadfast_api::UnixTime;
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::stream_request::Message as Up;
use steadfast_api::trust::v1::stream_response::Message as Down;
use steadfast_api_grpc::stream::{ALPN, Wire, framed};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::{Code, Status};

use super::{Mesh, WAIT, client_config, try_connect};

pub struct Proxy {
    wire: Wire<TlsStream<TcpStream>>,
    /// What was said before the test asks for it.
    first: Option<v1::StreamResponse>,
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

/// Says this first, and waits for the first answer.
pub async fn open(mesh: &Mesh, first: Option<Up>) -> Result<Proxy, Status> {
    let mut config = client_config([&mesh.founding.active, &mesh.founding.standby]);
    Arc::make_mut(&mut config).alpn_protocols = vec![ALPN.to_vec()];
    let io = try_connect(mesh.address, &config).await.unwrap();
    let mut proxy = Proxy { wire: Wire::new(io, 1 << 20), first: None };
    proxy.send(first).await;
    proxy.first = Some(proxy.hear().await?);
    Ok(proxy)
}

pub async fn web(mesh: &Mesh) -> Proxy {
    open(mesh, Some(hello("web", "uid-of-web-1"))).await.unwrap()
}

impl Proxy {
    pub async fn send(&mut self, message: Option<Up>) {
        self.send_raw(&framed(&v1::StreamRequest { message }, &[])).await;
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        self.wire.send(bytes).await.unwrap();
    }

    pub async fn next(&mut self) -> Result<Option<Down>, Status> {
        let said = match self.first.take() {
            Some(first) => first,
            None => self.hear().await?,
        };
        Ok(said.message)
    }

    async fn hear(&mut self) -> Result<v1::StreamResponse, Status> {
        let said = tokio::time::timeout(WAIT, self.wire.next()).await.unwrap();
        let said: v1::StreamResponse = said.unwrap().unwrap();
        assert!(said.server_time.is_some());
        match said.message {
            Some(Down::End(end)) => Err(Status::new(Code::from(end.code), end.message)),
            _ => Ok(said),
        }
    }

    pub async fn bundle(&mut self) -> v1::Bundle {
        match self.next().await.unwrap() {
            Some(Down::Bundle(bundle)) => bundle,
            other => panic!("no bundle but {other:?}"),
        }
    }
}
