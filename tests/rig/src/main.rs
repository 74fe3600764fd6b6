//! What the tests start in namespaces: an application, a load generator, a reader of admin ports,
//! and peers with certificates of the tests' making.

use std::net::SocketAddr;
use std::process::ExitCode;

use steadfast_test_rig::app::App;
use steadfast_test_rig::load::Load;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::Peer;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["http", addr] => serve(App::http(addr.parse()?).await?).await,
        ["tcp", addr] => serve(App::tcp(addr.parse()?).await?).await,
        ["load", load] => {
            let report = serde_json::from_str::<Load>(load)?.run().await;
            println!("{}", serde_json::to_string(&report)?);
            Ok(ExitCode::SUCCESS)
        }
        ["get", addr, path] => {
            let (status, body) =
                get(addr.parse::<SocketAddr>()?, path).await.map_err(anyhow::Error::msg)?;
            println!("{}\n{body}", status.as_u16());
            Ok(ExitCode::SUCCESS)
        }
        ["connect", peer] => {
            println!("{}", serde_json::from_str::<Peer>(peer)?.connect().await);
            Ok(ExitCode::SUCCESS)
        }
        ["serve", peer] => {
            println!("{}", serde_json::from_str::<Peer>(peer)?.serve().await);
            Ok(ExitCode::SUCCESS)
        }
        other => {
            eprintln!(
                "{other:?}: expected http ADDR, tcp ADDR, load JSON, get ADDR PATH, \
                 connect JSON or serve JSON"
            );
            Ok(ExitCode::from(2))
        }
    }
}

async fn serve(app: App) -> anyhow::Result<ExitCode> {
    println!("listening on {}", app.addr);
    std::future::pending().await
}
