//! The admin port: who the service is, who its members are, and the orders it takes.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use prometheus_client::registry::Registry;
use steadfast_identity::admin::Pages;
use steadfast_process::Clock as _;
use support::Mesh;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn ask(mesh: &Mesh, method: Method, uri: &str) -> (StatusCode, String) {
    let pages = Pages {
        certifier: mesh.app.certifier.clone(),
        own: mesh.app.own.clone(),
        streams: mesh.app.streams.clone(),
    };
    let request = Request::builder().method(method).uri(uri).body(Bytes::new()).unwrap();
    let answer = pages.answer(&request).unwrap();
    (answer.status(), answer.into_body())
}

#[tokio::test]
async fn a_query_out_of_its_range_is_refused_by_value_and_range_and_spoils_no_later_one() {
    let mesh = Mesh::start().await;
    let micros = mesh.clock.now().as_millis() * 1000;
    for nonce in ["0", "-1", "x", "", &u64::MAX.to_string(), &(micros + 3_600_000_000).to_string()]
    {
        let (status, body) = ask(&mesh, Method::POST, &format!("/query?nonce={nonce}"));
        assert_eq!(status, StatusCode::BAD_REQUEST, "{nonce}");
        assert!(body.contains(&format!("{nonce:?}")) && body.contains("from 1 to "), "{body}");
    }
    for nonce in ["7", "9", &micros.to_string()] {
        let (status, body) = ask(&mesh, Method::POST, &format!("/query?nonce={nonce}"));
        assert_eq!((status, body), (StatusCode::OK, format!("{{\"nonce\":{nonce}}}\n")));
    }
    for taken in ["9", &micros.to_string()] {
        let (status, body) = ask(&mesh, Method::POST, &format!("/query?nonce={taken}"));
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(body.contains(&format!("from {} to ", micros + 1)), "{body}");
    }
}

#[tokio::test]
async fn a_window_longer_than_a_life_is_refused_by_value_and_range() {
    let mesh = Mesh::start().await;
    for window in ["3601", "x", "-1", "1.5", "", &u64::MAX.to_string()] {
        let (status, body) = ask(&mesh, Method::POST, &format!("/renew?window_s={window}"));
        assert_eq!(status, StatusCode::BAD_REQUEST, "{window}");
        assert!(body.contains(&format!("{window:?}")) && body.contains("from 0 to 3600"), "{body}");
    }
    for window in ["0", "3600"] {
        let (status, body) = ask(&mesh, Method::POST, &format!("/renew?window_s={window}"));
        assert_eq!(status, StatusCode::OK, "{body}");
    }
}

#[tokio::test]
async fn the_port_tells_the_services_own_identity_and_its_members() {
    let mesh = Mesh::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(mesh.app.admin(Registry::default()).serve(listener, mesh.drain.clone()));
    let get = async |path: &str| {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<serde_json::Value>(body).unwrap()
    };
    let identity = get("/identity.json").await;
    let id = "spiffe://cluster.local/ns/steadfast/sa/steadfast-identity";
    assert_eq!(identity["spiffe_id"], id);
    assert_eq!(identity["anchor"], mesh.founding.active.id.to_string());
    assert_eq!(identity["bundle_seq"], 1);
    assert_eq!(identity["bundle_anchors"].as_array().unwrap().len(), 2);
    let chain = pem::parse_many(identity["chain_pem"].as_str().unwrap()).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1].contents(), mesh.founding.issuer.der);
    assert_eq!(get("/members").await, serde_json::json!({"forgotten": null, "members": []}));
}
