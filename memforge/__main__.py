from memforge.cli import main

main()
