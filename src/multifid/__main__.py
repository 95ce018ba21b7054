from multifid.cli import main

main()
